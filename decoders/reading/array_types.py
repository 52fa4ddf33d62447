"""The arrays that retrieval works with."""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.unsignedinteger]
"""Token ids; uint16 where the vocabulary allows it, else uint32."""
Numbers = NDArray[np.int64]
"""Numbers of datastore entries; -1 where an index had none to give."""
Floats = NDArray[np.float32]
"""Distances and probabilities."""
Keys = NDArray[np.float16]
"""Datastore keys, [entries, width]."""
