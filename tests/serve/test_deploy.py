"""The container and the manifests against the server that they start: options, ports, probes, times, metric names.

No image is built here: that wants a container engine.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from tenon.cli.app import app

if TYPE_CHECKING:  # most of these need no server
    from tests.serve.house import Running

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in (DEPLOY / "kubernetes").glob("*.yaml")}
POD = FILES["deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def serve_options(words: list[str]) -> dict[str, Any]:
    """What `tenon serve` makes of its words; it refuses what it does not know."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup) and words[0] == "serve"
    return group.commands["serve"].make_context("serve", words[1:]).params


def docker_line(word: str) -> list[str]:
    (line,) = re.findall(rf"^{word} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return yaml.safe_load(line)


def test_every_manifest_is_there_and_applied() -> None:
    assert len(FILES) == 8
    applied = FILES["kustomization"]["resources"]
    assert {Path(name).stem for name in applied} == FILES.keys() - {"kustomization", "prometheus-adapter-rule"}
    kinds = {tree["kind"] for tree in FILES.values() if "kind" in tree}
    assert kinds == {
        "Deployment", "Service", "PersistentVolumeClaim", "Secret", "PodDisruptionBudget", "HorizontalPodAutoscaler",
        "Kustomization",
    }  # fmt: skip


@pytest.mark.parametrize("words", [CONTAINER["args"], docker_line("CMD")], ids=["pod", "image"])
def test_the_command_has_these_options_and_listens_where_it_is_asked(words: list[str]) -> None:
    options = serve_options(words)
    assert options["host"] == "0.0.0.0" and options["port"] == CONTAINER["ports"][0]["containerPort"]
    assert f"EXPOSE {options['port']}" in DOCKERFILE and docker_line("ENTRYPOINT") == ["tenon"]


def test_a_pod_has_time_to_finish_what_runs() -> None:
    drain = serve_options(CONTAINER["args"])["drain"]
    _, waited = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] >= drain + float(waited) + 10


def test_names_and_labels_meet() -> None:
    labels = FILES["deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        FILES["deployment"]["spec"]["selector"]["matchLabels"],
        FILES["service"]["spec"]["selector"],
        FILES["disruption"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert FILES["autoscaling"]["spec"]["scaleTargetRef"]["name"] == FILES["deployment"]["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes.keys()
    assert volumes["home"]["persistentVolumeClaim"]["claimName"] == FILES["storage"]["metadata"]["name"]
    assert volumes["keys"]["secret"]["secretName"] == FILES["keys"]["metadata"]["name"]
    (port,) = FILES["service"]["spec"]["ports"]
    assert port["targetPort"] == CONTAINER["ports"][0]["name"]


def test_the_home_is_the_volume_and_the_user_is_the_image_s() -> None:
    environment = {item["name"]: item["value"] for item in CONTAINER["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert environment["TENON_HOME"] == mounts["home"] and f"TENON_HOME={mounts['home']}" in DOCKERFILE
    assert mounts["keys"] == f"{mounts['home']}/keys.json"
    settings = (DEPLOY.parent / "src/tenon/settings.py").read_text()
    assert all(f'"{name}"' in settings for name in environment)
    user = POD["securityContext"]["runAsUser"]
    assert (
        POD["securityContext"]["runAsNonRoot"] and f"\nUSER {user}\n" in DOCKERFILE and f"--uid {user} " in DOCKERFILE
    )


def test_probes_and_metrics_are_those_of_a_server_that_runs(running: Running) -> None:
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert running.ask(CONTAINER[probe]["httpGet"]["path"])[0] == 200
    annotations = FILES["deployment"]["spec"]["template"]["metadata"]["annotations"]
    status, text = running.ask(annotations["prometheus.io/path"])
    (metric,) = FILES["autoscaling"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert status == 200 and f"\n{name} " in text
    (rule,) = FILES["prometheus-adapter-rule"]["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{") and re.fullmatch(rule["name"]["matches"], name)
    assert rule["name"]["as"] == name


def test_the_image_s_health_check_says_whether_the_server_lives(running: Running) -> None:
    (line,) = re.findall(r"^HEALTHCHECK .*\n\s+CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    program = yaml.safe_load(line)[2]
    assert "127.0.0.1:8000" in program
    here = program.replace("127.0.0.1:8000", f"{running.host}:{running.port}")
    assert subprocess.run([sys.executable, "-c", here], check=False).returncode == 0
    nobody = program.replace("127.0.0.1:8000", "127.0.0.1:9")
    assert subprocess.run([sys.executable, "-c", nobody], check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_what_the_image_is_built_of_exists() -> None:
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*) \./\S*$", DOCKERFILE, re.MULTILINE)
        for word in shlex.split(line)
    ]
    assert copied == ["pyproject.toml", "README.md", "LICENSE", "src"]
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert all((DEPLOY.parent / name).exists() and f"!{name}" in kept for name in copied)
