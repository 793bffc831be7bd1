"""Writers killed at random moments, see faults.py; a sample here, MEMLM_KILLS=100 of each in `make test-faults`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = int(os.environ.get("MEMLM_KILLS", "5"))


def run(operation, kills, seed, folder):
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(HERE / "faults.py"), operation, str(kills), str(seed), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", ["build", "add", "remove", "compact", "compress", "prune", "merge"])
def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path, operation):
    done = run(operation, KILLS, 0, tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["killed"] == KILLS


@pytest.mark.parametrize("careless", ["name_early", "sweep_early"])
def test_a_careless_writer_is_caught(tmp_path, careless):
    done = run(careless, 40, 0, tmp_path)
    assert done.returncode != 0
    assert "is not a sound manifest" in done.stderr
