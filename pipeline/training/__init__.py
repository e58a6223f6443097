"""From histories to training batches.

loader runs the stages in two threads: sampler (the windows of each step and rank), windows (cuts
histories), cloze or two_stream (mask items), shape_buckets (pads to few batch shapes), negatives
(for sampled losses, by an alias_table), slots (for requests to other ranks), to_tensors (packs
batches). chunks holds their data, config the flags.

May import batches, preparation and the files of pipeline/.
"""
