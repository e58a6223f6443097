"""Export a trained BERT4Rec into a folder that serves it without this project.

    python export.py --checkpoint runs/ml-1m --output exported/
    python recommend.py --checkpoint exported/ --history "1193,661,914"

Reads the run's exported model, or its best checkpoint if training has not ended. docs/serving.md
describes the files.
"""

import sys
from pathlib import Path

from model.run.script import start_script
from model.settings.config import ExportFlags
from model.settings.flags import FlagParser
from pipeline.errors import UserError


def read_flags() -> ExportFlags:
    """The flags on the command line."""
    return FlagParser(__doc__, ExportFlags).parse(sys.argv[1:])


def export_model(flags: ExportFlags) -> None:
    """Load the model, write the folder."""
    # Imported here because torch and TorchRec take seconds: read_flags does without them.
    from model.checkpoints.export import export
    from model.distributed import start
    from model.run.folder import check_export
    from model.run.trained import TrainedRun
    from model.settings.config import EvalFlags

    ranks = start()
    if ranks.world_size > 1:
        raise UserError("export.py runs in one process: start it without torchrun")
    run, output = TrainedRun(EvalFlags(checkpoint=flags.checkpoint)), Path(flags.output)
    if flags.with_users:
        run.check_users()
    check_export("--output", output, run.folder, run.config.windows.max_len)
    trained = run.trained(ranks)
    export(trained, output, flags.with_users, with_programs=True)
    ranks.say(f"exported step {trained.step} to {output}")


def main() -> None:
    """Export with the flags of the command line."""
    start_script(read_flags, export_model, lambda flags: "use a machine with more memory")


if __name__ == "__main__":
    main()
