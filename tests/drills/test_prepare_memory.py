"""A gigabyte of text in bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_job

GIGABYTE = 10**9

# The peak of the process itself, and of what is its own in it: mapped files are not, the system takes them back.
WATCHED = """
import sys, threading, time
from clm_dist.cli.app import main

peaks = {"VmRSS": 0, "RssAnon": 0}

def watch():
    while True:
        for line in open("/proc/self/status"):
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
try:
    main()
finally:
    print(*peaks.values())
"""


@pytest.mark.slow
def test_a_gigabyte_of_text_takes_less_than_two_of_memory(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    texts = [text for text in topics.values() if len(text) > 500]
    path = tmp_path / "records.jsonl"
    written = number = 0
    with path.open("w") as file:
        while written < GIGABYTE:
            text = f"{number} {texts[number % len(texts)]}"
            file.write(json.dumps({"topic": f"t{number}", "text": text}) + "\n")
            written += len(text.encode())
            number += 1
    job = tiny_job(path)
    # Trained before, on little.
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(job | {"data": job["data"] | {"split": "train[:500]"}}))
    command = [sys.executable, "-m", "clm_dist", "prepare", str(small), "--store", str(tmp_path / "stores")]
    store = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    job["tokenizer"] = {"path": f"{store}/tokenizer"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    ended = subprocess.run(
        [sys.executable, "-c", WATCHED, "prepare", str(tmp_path / "job.yaml"), "--store", str(tmp_path / "stores")],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    resident, own = (int(kib) / 2**20 for kib in ended.stdout.split()[-2:])
    print(f"{resident:.2f} GiB resident, {own:.2f} GiB of them its own")
    assert resident < 2
    assert own < 1
