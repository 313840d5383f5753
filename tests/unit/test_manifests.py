"""The files for Kubernetes and for containers, as far as they can be read without a cluster."""

import yaml

from tests.utils.workspace import ROOT

LAUNCH = ROOT / "launch"
JOB, RDMA = LAUNCH / "k8s" / "job.yaml", LAUNCH / "k8s" / "rdma.yaml"


def test_the_kubernetes_job_has_what_several_nodes_need():
    service, job = yaml.safe_load_all(JOB.read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    assert (service["kind"], service["spec"]["clusterIP"], service["metadata"]["name"]) == (
        "Service",
        "None",
        name,
    )
    assert service["spec"]["publishNotReadyAddresses"] and service["spec"]["selector"] == {
        "job-name": name
    }
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == (
        "batch/v1",
        "Job",
        "Indexed",
    )
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(env["NNODES"]) > 1
    assert pod["subdomain"] == name and env["MASTER_ADDR"] == f"{name}-0.{name}"
    assert int(env["MASTER_PORT"]) == service["spec"]["ports"][0]["port"]
    assert "job-completion-index" in env["NODE_RANK"]["fieldRef"]["fieldPath"]
    assert (
        container["command"] == ["launch/torchrun.sh"] and (ROOT / container["args"][0]).is_file()
    )
    assert "train.resume=auto" in container["args"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm" and {volume["name"] for volume in pod["volumes"]} == set(
        mounts
    )
    assert env["HF_HOME"].startswith(f"{mounts['cache']}/")


def test_the_patch_for_rdma_adds_its_resource_to_the_container_of_the_kubernetes_job():
    kustomization = yaml.safe_load((LAUNCH / "k8s" / "kustomization.yaml").read_text())
    assert kustomization["resources"] == [JOB.name]
    assert kustomization["patches"] == [{"path": RDMA.name}]
    _, job = yaml.safe_load_all(JOB.read_text())
    patch = yaml.safe_load(RDMA.read_text())
    for key in ("apiVersion", "kind"):
        assert patch[key] == job[key]
    assert patch["metadata"]["name"] == job["metadata"]["name"]
    (trained,), (patched,) = (
        whole["spec"]["template"]["spec"]["containers"] for whole in (job, patch)
    )
    assert patched["name"] == trained["name"]
    assert patched["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    (resource,) = patched["resources"]["limits"]
    assert resource.startswith("rdma/") and resource not in trained["resources"]["limits"]


def test_the_image_gets_what_the_launch_scripts_need():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert "WORKDIR /workspace" in lines and "COPY . ." in lines
    names = [line.removeprefix("!") for line in kept if line.startswith("!")]
    assert {"launch", "scaleup", "configs", "requirements.txt"} <= set(names)
    assert all((ROOT / name).exists() for name in names)
