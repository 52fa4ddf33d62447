"""Training memory decoders: one file per artifact, in the order they are made.

corpus -> near_duplicates -> tokens -> teacher -> datastore -> knn_targets -> decoder -> package

`reading/` holds the readers of the artifacts that are served; the server imports it and nothing else of this folder.
"""
