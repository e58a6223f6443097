"""From histories to training batches.

    loader.py          all stages in order, and a thread that runs ahead
    chunks.py          the arrays that stages hand on
    sampler.py         which rank trains which window when
    windows.py         windows of at most max_len items
    cloze.py           which positions are masked, and by what
    two_stream.py      another way to train left-context rows
    shape_buckets.py   padding to few batch shapes
    negatives.py       negatives for sampled losses
    to_tensors.py      arrays -> batches

May import batches/, preparation/ and the files of pipeline/.
"""
