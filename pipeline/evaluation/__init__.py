"""From histories to evaluation batches.

    holdout.py   held-out targets, known items, sampled negatives

May import batches/, preparation/ and the files of pipeline/.
"""
