"""The command line of training and of the model store: `python -m training`."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # The imports below take seconds; Ctrl-C during them must not print a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import typer

from training.commands import store
from training.commands.recalibrate import calibrate
from training.commands.series import train_all
from training.commands.train import train

app = typer.Typer(
    help="Train autoencoders, and manage the model store of the service.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.command("train")(train)
app.command("all")(train_all)
app.command("calibrate")(calibrate)
app.command("publish")(store.publish)
app.command("sign")(store.sign)
app.command("promote")(store.promote)
app.command("rollback")(store.rollback)
app.command("list")(store.list_versions)
app.command("verify")(store.verify)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app(prog_name="python -m training")
