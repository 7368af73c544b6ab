"""The files of docs/serving.md, as they are: the unit, the batch script, the proxy's block."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tokenizer_folders
from helpers.model_folders import save_endless
from helpers.paths import REPOSITORY
from helpers.server import serving, wait_for
from helpers.slurm_cluster import SlurmCluster

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def block(language: str, contains: str) -> str:
    """A code block of the page."""
    page = (REPOSITORY / "docs/serving.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (one,) = [text for text in found if contains in text]
    return one


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("served")
    return save_endless(place / "tiny", tokenizer_folders.byte_level(place / "tokenizer"))


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = block("ini", "ExecStart")
    words = re.search(r"^ExecStart=(\S+) (.*)$", unit, re.MULTILINE)
    sllm = tmp_path / "sllm"
    sllm.write_text("#!/bin/sh\n")
    sllm.chmod(0o755)
    (tmp_path / "sllm.service").write_text(unit.replace(words.group(1), str(sllm)))
    command = [program("systemd-analyze"), "verify", "--recursive-errors=no", str(tmp_path / "sllm.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    broken = unit.replace("Restart=on-failure", "Restart=sometimes")
    (tmp_path / "sllm.service").write_text(broken.replace(words.group(1), str(sllm)))
    assert "sometimes" in subprocess.run(command, capture_output=True, text=True).stderr
    help_page = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(word in help_page for word in words.group(2).split() if word.startswith("--"))


@pytest.mark.long
@pytest.mark.launch
def test_nginx_passes_streams_on(folder: str, tmp_path: Path) -> None:
    nginx = program("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(folder) as server:
        text = block("nginx", "location /v1/").replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        paths = "".join(
            f"{name}_temp_path {tmp_path}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = tmp_path / "nginx.conf"
        config.write_text(
            f"daemon off;\npid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{paths}server {{\nlisten 127.0.0.1:{port};\n{text}}}\n}}\n"
        )
        command = [nginx, "-p", str(tmp_path), "-e", "stderr", "-c", str(config)]
        subprocess.run([*command, "-t"], check=True)
        with subprocess.Popen(command) as process:
            try:
                wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                body = {"model": "tiny", "prompt": "x", "max_tokens": 3000, "stream": True, "seed": 1}
                started = time.monotonic()
                connection.request("POST", "/v1/completions", json.dumps(body))
                answer = connection.getresponse()
                assert answer.status == 200
                first = answer.readline()
                first_seconds = time.monotonic() - started
                rest = answer.read()
                seconds = time.monotonic() - started
                assert first.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
                assert first_seconds < seconds / 2  # it was not held back
                # A reader that leaves is known behind the proxy, too.
                connection.request("POST", "/v1/completions", json.dumps(body))
                connection.getresponse().readline()
                assert server.batcher.generating == 1
                connection.close()
                wait_for(lambda: server.batcher.generating == 0, 5)
            finally:
                process.terminate()


@pytest.mark.slurm
@pytest.mark.long
def test_a_job_serves_and_drains(folder: str, tmp_path: Path) -> None:
    script = tmp_path / "serve.sh"
    script.write_text(block("bash", "sllm serve"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sllm").write_text(
        f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m pipeline.cli "$@"\n'
    )
    (programs / "sllm").chmod(0o755)
    with SlurmCluster(tmp_path / "slurm", nodes=1, cpus=8) as cluster:
        cluster.environment |= {"MODEL": folder, "SLLM_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
        cluster.environment["PATH"] = f"{programs}:{cluster.environment['PATH']}"
        log = tmp_path / "log"
        job = cluster.run("sbatch", "--parsable", f"--output={log}", str(script)).stdout.strip()
        wait_for(lambda: log.exists() and "serving" in log.read_text(), 120)
        url = re.search(r"http://10\.99\.0\.1:8000", log.read_text()).group()
        ask = f"""
import json, urllib.request
body = json.dumps({{"model": "tiny", "prompt": "x", "max_tokens": 5}}).encode()
request = urllib.request.Request("{url}/v1/completions", body, {{"authorization": "Bearer secret"}})
print(json.load(urllib.request.urlopen(request))["usage"]["completion_tokens"])
"""
        assert cluster.run(sys.executable, "-c", ask).stdout.strip() == "5"
        # What Slurm does a minute before the time limit.
        cluster.run("scancel", "--signal=TERM", job)
        record = cluster.wait_for_job(job, 60)
        assert record["JobState"] == "COMPLETED", log.read_text()
        assert "stopped" in log.read_text() and "secret" not in log.read_text()
