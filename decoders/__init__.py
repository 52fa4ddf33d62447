"""Training memory decoders: one file per artifact, in the order they are made.

corpus -> tokens -> datastore -> knn_targets -> decoder -> package
"""
