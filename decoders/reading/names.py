"""Names of stages, files and domains. Imports nothing heavy, so that the command line can check options at once."""

import re

STAGES = ("near-duplicates", "tokens", "teacher", "datastore", "knn-targets", "student", "decoder", "package")  # of a build, in order
RECORD = "memory_decoder.json"  # the file that makes a folder a decoder package
HEAD_BIAS = "lm_head.bias"  # the weight of a decoder that is added to its logits, where its architecture has no such bias
DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a domain's name: safe in a header, a model alias and a metric label
DOMAIN_RULE = "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
