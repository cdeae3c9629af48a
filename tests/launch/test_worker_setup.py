import gc
import subprocess
import sys

from hpo_verl.runs import worker_setup


def test_the_collector_walks_all_objects_seldom():
    before = gc.get_threshold()
    try:
        worker_setup.collect_garbage_seldom()
        young, middle, old = gc.get_threshold()
    finally:
        gc.set_threshold(*before)
    # Python's own are 700, 10 and 10; a step of 512 samples makes about a million objects.
    assert young * middle * old > 10_000_000


def test_the_hook_leaves_torch_to_be_imported_after_ray_has_set_the_threads():
    code = "import hpo_verl.runs.worker_setup, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
