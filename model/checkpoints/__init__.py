"""Save, verify, load and export the state of training; may import step and the rooms below it.

config: flags. position: where training stands, the part of a checkpoint that is not tensors.
manifest: sizes and checksums of a checkpoint's files. weights: checks of stored weights.
weights_file: a safetensors file, written in parts. safe_reader: read a checkpoint without running
code from it. writer: write one checkpoint with all ranks, possibly in a thread. checkpoints: when
to save, what to keep, what to resume from. export: the model as safetensors; exported: check and
load it.
"""
