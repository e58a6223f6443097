"""From histories to evaluation batches.

    holdout    held-out items, seen items and sampled negatives of each user
    repeats    targets that a user had before, and rankings that repeat a user's items
    recent     items that were popular in the last days, for splits by time
    config     flags of the evaluation

May import batches, preparation and the files of pipeline/.
"""
