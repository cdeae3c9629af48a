"""`ray start` for a second node on this machine, with every server on loopback.

Ray binds to loopback where RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, but then its
command line refuses further nodes; otherwise it replaces 127.0.0.1 by an address
that the network can reach. Only this process is told otherwise.
"""

from ray._private import ray_constants, services
from ray.scripts.scripts import main

ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"

if __name__ == "__main__":
    main()
