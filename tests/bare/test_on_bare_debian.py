"""What README and operations.md tell people to type, typed on a Debian 12 that has nothing of it.

The tests are one story on one machine: nobody there has Python; somebody follows the README, then operations.md as
operator of a controller and as admin of a device; then we look at what has come of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.bare.documents import DOCUMENTS, Block, shell_blocks
from tests.bare.machine import BROKER, Machine, missing

pytestmark = pytest.mark.timeout(1200)

README, OPERATIONS = DOCUMENTS
ASK = """
import json, urllib.request
base = "http://127.0.0.1:8600/v1"
model = json.load(urllib.request.urlopen(base + "/models"))["data"][0]["id"]
question = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
headers = {"Content-Type": "application/json"}
call = urllib.request.Request(base + "/chat/completions", json.dumps(question).encode(), headers)
print(json.load(urllib.request.urlopen(call, timeout=120))["choices"][0]["message"]["content"])
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    assert not missing(), f"a machine cannot be made without {missing()}; make test-bare installs what Debian has"
    with Machine() as made:
        yield made


def test_the_message_on_a_missing_venv_module_can_be_obeyed(machine: Machine):
    machine.must("apt-get update && apt-get install -y git make python3")
    assert "gcc" not in machine.must("ls /usr/bin"), "no compiler is there, now or later"
    half = machine.run("python3 -m venv .venv", "operator")
    assert half.code != 0 and machine.run("test -e .venv/bin/python", "operator").code == 0, "half of one is left"
    refused = machine.run("make dist", "operator")
    assert refused.code != 0
    command = re.search(r"run:  (.+)$", refused.output, re.MULTILINE)
    assert command is not None, refused.output
    machine.must(command[1], "operator")
    assert "phifleet-" in machine.must("make dist", "operator"), "what was half-made is completed"
    machine.must("make clean && rm -r dist", "operator")


@pytest.mark.parametrize("block", [block for path in DOCUMENTS for block in shell_blocks(path)], ids=str)
def test_block(machine: Machine, block: Block):
    if block.not_run:
        if block.text.startswith("scp "):  # the two machines are one here: what the copy would do, between two homes
            machine.must("install -o admin ~operator/phifleet/box-1.json ~operator/phifleet/dist/*.whl ~admin/")
        pytest.skip(block.not_run)
    machine.must(block.text, block.user)


def test_the_demo_ended_with_paris_and_left_nothing(machine: Machine):
    """Of the README, once more by hand: its words, its exit code, and a second run that needs no index."""
    output = machine.must("PIP_NO_INDEX=1 make demo", "operator")
    assert "Paris" in output and "cleaned up" in output and "ARGS=--keep" in output
    assert machine.must("ls /tmp").count("phifleet-demo-") == 0
    assert "gcc" not in machine.must("ls /usr/bin"), "it needed no compiler"


def test_sigterm_ends_a_demo_in_the_background_of_a_script_as_cleanly(machine: Machine):
    script = """
    make demo > /tmp/demo.log 2>&1 &
    until grep -q '^.4/9' /tmp/demo.log; do kill -0 $!; sleep 0.2; done
    kill -TERM $!
    wait $! || true
    """
    machine.must(script, "operator", timeout_s=180)
    assert "Traceback" not in machine.must("cat /tmp/demo.log")
    left = [line for user, line in machine.processes() if user == "operator" and ("fleet" in line or "agent" in line)]
    assert left == []
    assert machine.must("ls /tmp").count("phifleet-demo-") == 0


def test_the_agent_runs_without_any_toolchain(machine: Machine):
    """The wheel alone, in an environment of its own."""
    machine.must("python3 -m venv alone && alone/bin/pip install --quiet phifleet-*.whl", "admin")
    assert machine.must("alone/bin/phifleet-agent --version", "admin").startswith("phifleet-agent, version ")
    probed = machine.must("alone/bin/phifleet-agent --state-dir alone/state probe", "admin")
    assert re.search(r"(?s)onnx_genai.*not installed.*-m pip install 'phifleet-\S+\.whl\[onnx\]'", probed), probed
    installed = machine.must("alone/bin/pip list", "admin").lower()
    assert not any(name in installed for name in ("numpy", "torch", "sqlalchemy", "transformers", "rich"))
    refused = machine.run("alone/bin/phifleet init", "admin")
    assert refused.code == 1 and "-m pip install 'phifleet-" in refused.output and "[fleet]'" in refused.output


def test_service_and_operator_have_one_setting_each(machine: Machine):
    shown = machine.must("phifleet --show-config", "operator")
    assert f"broker = mqtts://{BROKER}:8883  (/etc/phifleet/fleet.toml)" in shown
    assert "home = /var/lib/phifleet  (/etc/phifleet/fleet.toml)" in shown
    environment = machine.must("systemctl show phifleet -p Environment -p EnvironmentFiles")
    assert "LOG_FORMAT" in environment and "HOME" not in environment and ".env" not in environment


def test_the_services_run_and_were_never_restarted(machine: Machine):
    for unit in ("phifleet", "phifleet-agent", "mosquitto"):
        state = machine.must(f"systemctl show {unit} -p ActiveState -p NRestarts -p User")
        assert "ActiveState=active" in state and "NRestarts=0" in state, f"{unit}: {state}\n{machine.journal()}"
    running = {(user, word) for user, line in machine.processes() for word in line.split()[:2]}
    assert ("mosquitto", "/usr/sbin/mosquitto") in running, "Debian's mosquitto, as its own user"
    assert ("phifleet", "/opt/phifleet/bin/phifleet") in running
    assert ("phifleet-agent", "/opt/phifleet/bin/phifleet-agent") in running


def test_the_device_answers_and_the_operator_sees_it(machine: Machine):
    answer = machine.must(f"python3 - <<'EOF'\n{ASK}\nEOF", "admin")
    assert "Paris" in answer
    (row,) = json.loads(machine.must("phifleet device list --json", "operator"))
    assert (row["device"], row["profile"], row["online"]) == ("box-1", "rehearsal", True)
    status = machine.must("phifleet-agent status", "admin")
    assert "smollm2" in status, status


def test_nobody_else_reads_keys_or_bundles(machine: Machine):
    secrets = ("/etc/phifleet/controller-key.pem", "/etc/mosquitto/phifleet/broker-key.pem")
    for command in ("ls /var/lib/phifleet", "ls /var/lib/phifleet-agent", *(f"cat {path}" for path in secrets)):
        assert "Permission denied" in machine.run(command, "admin").output, command
    assert machine.must("stat -c %a ~operator/phifleet/box-1.json").strip() == "600"


def test_a_revocation_reaches_the_broker_by_itself(machine: Machine):
    before = machine.must("sha256sum < /etc/mosquitto/phifleet/crl.pem")
    machine.must("phifleet device remove box-1 --yes", "operator")
    same = "cmp -s /var/lib/phifleet/ca/crl.pem /etc/mosquitto/phifleet/crl.pem"
    machine.must(f"timeout 10 bash -c 'until {same}; do sleep 0.1; done'")
    assert machine.must("sha256sum < /etc/mosquitto/phifleet/crl.pem") != before
    assert "ActiveState=active" in machine.must("systemctl show mosquitto -p ActiveState")
