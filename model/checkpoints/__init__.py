"""Save, verify, load and export the state of training.

    config.py        flags: when to save and what to keep
    position.py      where training stands: the part of a checkpoint that is not tensors
    manifest.py      sizes and checksums of a checkpoint's files
    safe_reader.py   read a checkpoint without running code from it
    writer.py        write one checkpoint, all ranks together, possibly in a thread
    checkpoints.py   the checkpoints of a run: when to save, what to keep, what to resume from
    export.py        the trained model as safetensors

May import: pipeline.errors, pipeline.files, pipeline.preparation.catalog, model.distributed,
model.tables, model.step. Comments that begin "Private:" mark private or unstable names of torch.
"""
