"""Build the image, run the manifests of a laptop as pods on this machine, and train against them.

    python -m tests.deploy.up [--overlay laptop] [--seconds 10]

Needs root and Debian's packages buildah, debootstrap, runc and iproute2. Prints what happens to
each pod. Ends with status 1 if the trainer had an error or the sums in its table are wrong.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.deploy import image
from tests.deploy.simulator.pods import Simulator, rendered
from tests.deploy.simulator.training import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overlay", default="laptop", help="Directory below deploy/overlays.")
    parser.add_argument("--seconds", type=float, default=10.0, help="How long to train.")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        built = image.build()
    except image.BuildFailed as error:
        sys.exit(f"up: {error}")
    print(f"image {built.identity[:12]} after {time.monotonic() - start:.0f} s", flush=True)
    with Simulator(echo=True) as pods:
        pods.apply(rendered(options.overlay))
        pods.wait("three shards serve", lambda: pods.control.is_rolled_out("ps"), 120)
        with Trainer(pods, "trainer") as trainer:
            print(f"a trainer works {time.monotonic() - start:.0f} s after the start", flush=True)
            time.sleep(options.seconds)
        print(f"trainer: {trainer.report}", flush=True)
    if trainer.report.errors or not trainer.report.exact:
        sys.exit(1)


if __name__ == "__main__":
    main()
