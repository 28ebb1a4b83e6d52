"""A save that is killed at any step leaves the old checkpoint or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hqq import QuantConfig, load_quantized, quantize_model, save_quantized
from hqq.errors import CheckpointError
from hqq.models.checkpoint.disk import Disk

# Forks a child for every step, kills it there with SIGKILL, and prints one line for each.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.models.test_checkpoint_atomic import STEPS, Doomed, make_model, name_of
from hqq import save_quantized

target, first, format, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True"
old, new = make_model(0), make_model(1)
other = {"pt": "safetensors", "safetensors": "pt"}[format]
step = 0
while True:
    if first == "absent":
        import shutil
        shutil.rmtree(target, ignore_errors=True)
    else:
        save_quantized(old, target, format=other)
        (target / "tokenizer.json").write_text("{}")
    child = os.fork()
    if child == 0:
        disk = Doomed(step, exchange, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save_quantized(new, target, format=format, max_shard_size=3000, disk=disk)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(step, name_of(target), (target / "tokenizer.json").exists(), len(list(target.parent.iterdir())), flush=True)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    step += 1
"""

STEPS = (
    "make_directory",
    "write_text",
    "write_tensors",
    "write_torch",
    "link",
    "copy",
    "sync",
    "rename",
    "exchange",
    "remove_tree",
)


class Doomed(Disk):
    """A disk on which step number `doom` never comes back; even steps before, odd ones after the operation."""

    def __init__(self, doom: int, exchange: bool, end: object) -> None:
        self.doom, self.can_exchange, self.end, self.step = doom, exchange, end, 0

    def __getattribute__(self, name: str) -> object:
        found = super().__getattribute__(name)
        if name not in STEPS:
            return found
        if name == "exchange" and not self.can_exchange:
            return lambda one, other: False

        def run(*args: object) -> object:
            self._maybe_end()
            if name == "remove_tree":  # may stop half-way: with one file gone
                for path in [path for path in sorted(args[0].iterdir()) if path.is_file()][:1]:
                    path.unlink()
                self._maybe_end()
            result = found(*args)
            self._maybe_end()
            return result

        return run

    def _maybe_end(self) -> None:
        self.step += 1
        if self.step == self.doom + 1:
            self.end()


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantize_model(model, QuantConfig(nbits=4, group_size=16))
    return model


def name_of(target: Path) -> str:
    """Return which of the two models the checkpoint holds, in full, with its config."""
    from hqq.models.checkpoint.atomic import recover

    recover(target, Disk())
    if not target.exists():
        return "absent"
    got = load_quantized(target, model=nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    assert (target / "config.json").exists()
    for seed, name in enumerate(("old", "new")):
        expected = make_model(seed).state_dict()
        if all(torch.equal(value, expected[key]) for key, value in got.state_dict().items()):
            return name
    return "half"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(
    ("first", "kind", "exchange"),
    [
        ("absent", "safetensors", True),
        ("old", "safetensors", True),
        ("old", "safetensors", False),
        ("old", "pt", True),
    ],
)
def test_killed_at_every_step(first: str, kind: str, exchange: bool, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(place / "m"), first, kind, str(exchange)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = [line[1] for line in lines]
    # The old one, then, from one moment on and for good, the new one.
    commit = names.index("new")
    assert names == [first] * commit + ["new"] * (len(names) - commit)
    assert commit > 0 and len(names) > 15
    if first == "old":
        assert all(line[2] == "True" for line in lines)  # the tokenizer beside it was there throughout
    # At the end nothing is left beside the checkpoint: what killed saves left has been removed.
    assert lines[-1][3] == "1"


@pytest.mark.parametrize("doom", range(0, 16, 2))
@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_at_any_step_leaves_one_of_the_two(doom: int, exchange: bool, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    save_quantized(make_model(0), tmp_path / "m", format="pt")
    with pytest.raises(CheckpointError, match="No space left"):
        save_quantized(make_model(1), tmp_path / "m", disk=Doomed(doom, exchange, fail))
    assert name_of(tmp_path / "m") in ("old", "new")


def test_an_old_directory_that_cannot_be_removed_does_not_undo_the_save(tmp_path: Path) -> None:
    class Stuck(Disk):
        def remove_tree(self, path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

    save_quantized(make_model(0), tmp_path / "m")
    with pytest.warns(ResourceWarning, match="could not remove .*no longer needed"):
        save_quantized(make_model(1), tmp_path / "m", disk=Stuck())
    assert name_of(tmp_path / "m") == "new"


def test_the_mode_of_the_directory_stays(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m").chmod(0o750)
    (tmp_path / "m" / "README.md").write_text("card")
    save_quantized(make_model(0), tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o750
