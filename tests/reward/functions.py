"""Rewards for the pool's tests, at module level so that worker processes can import them."""

import os
import subprocess
import time


def contains(completion, answer):
    return float(answer in completion)


def moody(completion):
    match completion:
        case "hang":
            time.sleep(600)
        case "spin":
            while True:
                pass
        case "raise":
            raise RuntimeError("broken verifier")
        case "exit":
            os._exit(3)
        case "nan":
            return float("nan")
        case "none":
            return None
        case "child":
            with open(os.environ["CHILD_FILE"], "w") as file:
                file.write(str(subprocess.Popen(["sleep", "600"]).pid))
            time.sleep(600)
    return 1.0


def process_id(completion):
    return os.getpid()
