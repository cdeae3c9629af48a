"""Prints the threads of a worker of verl's worker group; run by test_worker_threads.py.

Argument: the environment variables of the runtime environment, as JSON.
"""

import json
import sys

import ray
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup


class Actor(Worker):
    @register(Dispatch.ONE_TO_ALL)
    def threads(self):
        import torch

        return torch.get_num_threads()


if __name__ == "__main__":
    ray.init(
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": json.loads(sys.argv[1])},
    )
    pool = RayResourcePool([1], use_gpu=True, max_colocate_count=3)
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Actor)))
    print("threads:", *group.threads())
    ray.shutdown()
