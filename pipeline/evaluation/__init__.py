"""From histories to evaluation batches.

    holdout    held-out items, seen items and sampled negatives of each user
    config     flags of the sampled protocol

May import batches, preparation and the files of pipeline/.
"""
