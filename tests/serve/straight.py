"""A process that serves a policy which moves on from the state at an even pace: `PORT ROBOT CHECKPOINT TOKEN`."""

import sys
import time

import numpy as np

from manipi.serve import Access, PolicyServer

PACE, H = 0.01, 20


class Straight:
    def __init__(self, robot, checkpoint):
        self.metadata = {"robot": {"name": robot}, "checkpoint": checkpoint, "real_time": True}

    def infer(self, observation, noise=None):
        time.sleep(observation.get("seconds", 0))
        return {"actions": observation["state"] + PACE * np.arange(1, H + 1)[:, None]}


def tell(host, port):
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    port, robot, checkpoint, token = sys.argv[1:]
    server = PolicyServer(Straight(robot, checkpoint), port=int(port), access=Access(token=token))
    server.serve_forever(on_ready=tell)
