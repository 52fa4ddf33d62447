"""What serving and training share: the artifacts' formats, read and checked. It imports nothing else of ours.

A decoder package (`package`, `record`), its weights (`weights`) and tokenizer (`tokenizer`); a retrieval folder (`retrieval`) with its
kNN-LM datastore (`datastore`, `neighbours`) and passages (`passages`). The server imports this folder and no other of `decoders/`.
"""
