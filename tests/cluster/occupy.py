"""Reserve CPUs on every worker host until another job uses the rest: python tests/cluster/occupy.py CPUS

Ray Train packs its workers on as few nodes as possible. On nodes with one GPU each, that is one worker per node. On
these hosts without GPUs, all workers would be on one host.
"""

import sys
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote
class Holder:
    def ready(self) -> bool:
        return True


def main(cpus: int) -> None:
    ray.init(address="auto", log_to_driver=False)
    hosts = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    holders = [
        Holder.options(
            num_cpus=cpus, scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False)
        ).remote()
        for host in hosts
    ]
    ray.get([holder.ready.remote() for holder in holders])
    print("occupied", flush=True)
    while ray.available_resources().get("CPU", 0) >= 1:
        time.sleep(0.2)
    print("the rest is in use", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
