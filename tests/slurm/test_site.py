"""Profiles of sites: the shipped ones, a person's own, and what is refused with the nearest valid value."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rookery.sites import app
from slurm.site import SITES, Site, SiteError, account, load_site, site_from_record, site_names, site_to_yaml

SHIPPED = sorted(path.stem for path in SITES.glob("*.yaml"))
VARIABLES = ("env", "env_one_node", "env_many_nodes", "env_node_local", "on_hang")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory of the person's own profiles, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "rookery" / "sites"
    folder.mkdir(parents=True)
    return folder


def test_all_sites_of_the_plan_are_shipped() -> None:
    wanted = (
        "frontier lumi perlmutter alps leonardo juwels-booster jupiter marenostrum5 generic-nvidia generic-amd local"
    )
    assert sorted(wanted.split()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_complete(name: str) -> None:
    site = load_site(name)
    assert site.name == name
    assert site_from_record(yaml.safe_load(site_to_yaml(site)), "site.yaml") == site
    for section in VARIABLES:
        for variable in getattr(site, section).values():
            assert variable.why.strip()
            assert re.search(r"20[0-9]{2}|issue", variable.source), f"{variable.source!r} has no date"
    masks = [int(mask, 16) for mask in site.binding.cpu_masks]
    assert all(mask.bit_count() == site.cores_per_rank for mask in masks)
    assert sum(masks).bit_count() == sum(mask.bit_count() for mask in masks), "two ranks share a core"
    assert name == "local" or site.unverified, "nobody has run Rookery there: the profile must say so"


def test_what_sites_want_of_the_configuration_is_valid_there() -> None:
    from pipeline.config import load_config

    wanted = {key: value for name in SHIPPED for key, value in load_site(name).overrides.items()}
    config = load_config("smoke", ["comm.port=4000"], beneath=wanted)
    assert (config.comm.interface, config.comm.port) == (wanted["comm.interface"], 4000)


def test_frontier_is_the_stack_of_2026() -> None:
    site = load_site("frontier")
    assert {"cpe/26.03", "rocm/7.1.1", "rccl-net-plugin"} <= set(site.modules)
    assert site.sbatch["network"] == "disable_rdzv_get"
    assert site.env["FI_CXI_RDZV_PROTO"].value == "alt_read"
    assert (site.env_one_node["NCCL_NET"].value, site.env_many_nodes["NCCL_NET"].value) == ("Socket", "OFI")
    assert (site.ranks_per_node, site.cores_per_rank, site.cores_per_node) == (8, 7, 56)


def test_the_masks_of_a_node_put_each_rank_beside_its_device() -> None:
    first_cores = [
        (mask & -mask).bit_length() - 1 for mask in (int(m, 16) for m in load_site("lumi").binding.cpu_masks)
    ]
    assert first_cores == [49, 57, 17, 25, 1, 9, 33, 41]  # the one-core form of LUMI's documentation


def test_an_own_profile_extends_a_shipped_one(own: Path) -> None:
    (own / "mine.yaml").write_text("""
extends: frontier
title: Frontier, my way
modules: [mine/1.0]
sbatch: {network: null, core-spec: "0"}
proxy: null
on_hang: null
env:
  NCCL_SOCKET_IFNAME: {value: hsn0}
  NCCL_CROSS_NIC: null
""")
    base, site = load_site("frontier"), load_site("mine")
    assert (site.name, site.title, site.modules) == ("mine", "Frontier, my way", ["mine/1.0"])
    assert site.sbatch == {"gpus-per-node": "8", "core-spec": "0"}
    assert (site.proxy, site.on_hang) == (None, {})
    assert site.env["NCCL_SOCKET_IFNAME"] == dataclasses.replace(base.env["NCCL_SOCKET_IFNAME"], value="hsn0")
    assert "NCCL_CROSS_NIC" not in site.env
    assert site.queues == base.queues
    assert "mine" in site_names()


def test_an_own_profile_of_a_shipped_name_wins_and_may_extend_it(own: Path) -> None:
    (own / "lumi.yaml").write_text("extends: lumi\nsignal_seconds: 900\n")
    site = load_site("lumi")
    assert (site.signal_seconds, site.sbatch["mem"]) == (900, "480G")
    (own / "child.yaml").write_text("extends: lumi\n")
    assert load_site("child").signal_seconds == 900


def test_profiles_that_extend_each_other_are_refused(own: Path) -> None:
    (own / "a.yaml").write_text("extends: b\n")
    (own / "b.yaml").write_text("extends: a\n")
    with pytest.raises(SiteError, match="extends itself: a -> b -> a"):
        load_site("a")


def test_an_unknown_site_names_the_nearest() -> None:
    with pytest.raises(SiteError, match=r"no site 'fronteer' \(did you mean 'frontier'\?\); there are alps, "):
        load_site("fronteer")
    with pytest.raises(SiteError, match=r"no site '\.\./sites/lumi'"):
        load_site("../sites/lumi")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: frontir", r"extends: no site 'frontir' \(did you mean 'frontier'\?\)"),
        ("extends: lumi\nmodule: [x]", r"module: unknown key \(did you mean 'modules'\?\)"),
        ("extends: lumi\nqueues: [{partition: x, hour: 2}]", r"queues\[0\]\.hour: .* 'queues\[0\]\.hours'\?"),
        ("extends: lumi\nnode_local: {pth: /tmp}", r"node_local\.pth: .* 'node_local\.path'\?"),
        ("extends: lumi\nenv: {X: {value: '1'}}", r"env\.X\.why: a value is required"),
        ("extends: lumi\nenv: {X: {value: 0x10, why: y, source: z}}", r"env\.X\.value: 16 is not a text; .* quotes"),
        ("extends: lumi\nbinding: {cpu_masks: [0xfe]}", r"binding\.cpu_masks\[0\]: 254 is not a text"),
        ("extends: lumi\nsbatch: {time: '10'}", r"sbatch\.time: is decided at submission"),
        ("extends: lumi\nsbatch: {core_spec: '8'}", r"sbatch\.core_spec: write 'core-spec'"),
        ("extends: lumi\nchain: requeues", r"chain: 'requeues' is not one of .*did you mean 'requeue'\?"),
        ("extends: lumi\ncores_per_rank: 8", "8 ranks of 8 cores are more than the 56 of a node; at most 7"),
        ("extends: lumi\nbinding: {cpu_masks: ['0xfe']}", "1 masks for 8 ranks"),
        ("extends: lumi\nqueues: [{min_nodes: 9, max_nodes: 8}]", r"queues\[0\]\.max_nodes: 8 is below min_nodes 9"),
        ("extends: lumi\nqueues: [{hours: .nan}]", r"queues\[0\]\.hours: nan is not a finite number"),
        ("extends: lumi\nstage_method: copy\nnode_local: null", r"stage_method: copy needs node_local\.path"),
        ("title: x", "accelerator: a value is required"),
        ("title: x\ntitle: y", "key 'title' is given twice"),
    ],
)
def test_a_bad_profile_is_refused_with_its_file_and_a_remedy(own: Path, text: str, message: str) -> None:
    (own / "mine.yaml").write_text(text)
    with pytest.raises(SiteError, match=message) as refused:
        load_site("mine")
    assert str(own / "mine.yaml") in str(refused.value)


def test_variables_of_the_shell_stay_as_they_are_written(own: Path) -> None:
    value = r"1${SLURM_JOB_ID:0-4}/\${X}/$USER/$(hostname)"
    (own / "mine.yaml").write_text(f"extends: lumi\nenv: {{X: {{value: '{value}', why: y, source: z}}}}\n")
    site = load_site("mine")
    assert site.env["X"].value == value
    assert site_from_record(yaml.safe_load(site_to_yaml(site)), "site.yaml") == site


def _site(**changes: object) -> Site:
    return Site(name="s", title="t", accelerator="cpu", ranks_per_node=1, cores_per_node=1, cores_per_rank=1, **changes)  # type: ignore[arg-type]


def test_the_account_comes_from_the_command_line_before_the_environment() -> None:
    site = _site(account_required=True, account_variables=["BUDGET"])
    environment = {"BUDGET": "b", "SBATCH_ACCOUNT": "s"}
    assert account(site, "given", environment) == "given"
    assert account(site, None, environment) == "b"
    assert account(site, None, {"BUDGET": "", "SBATCH_ACCOUNT": "s"}) == "s"
    assert account(_site(), None, {}) is None


def test_a_missing_or_wrong_account_is_refused_with_the_remedy() -> None:
    with pytest.raises(SiteError, match="give --account NAME, or set BUDGET or SBATCH_ACCOUNT"):
        account(_site(account_required=True, account_variables=["BUDGET"]), None, {})
    with pytest.raises(SiteError, match="use --account m1234_g"):
        account(load_site("perlmutter"), None, {"SBATCH_ACCOUNT": "m1234"})
    assert account(load_site("perlmutter"), "m1234_g", {}) == "m1234_g"


def test_sites_list_shows_own_profiles_and_broken_ones_beside_the_others(own: Path) -> None:
    (own / "mine.yaml").write_text("extends: lumi\n")
    (own / "broken.yaml").write_text("a: [")
    result = CliRunner().invoke(app, ["list", "--json"])
    sites = {site["name"]: site for site in json.loads(result.stdout)["sites"]}
    assert set(sites) == {*SHIPPED, "mine", "broken"}
    assert sites["mine"]["accelerator"] == "rocm"
    assert "not valid YAML" in sites["broken"]["title"]


@pytest.mark.parametrize("name", SHIPPED)
def test_sites_show_gives_every_variable_with_reason_and_source(name: str) -> None:
    site = load_site(name)
    shown = CliRunner().invoke(app, ["show", name]).stdout
    for section in VARIABLES:
        for key, variable in getattr(site, section).items():
            assert f"{key}={variable.value}\n      {variable.why} [{variable.source}]" in shown
    for sentence in site.unverified + [row.unverified for row in site.queues if row.unverified]:
        assert sentence in shown
    as_json = json.loads(CliRunner().invoke(app, ["show", name, "--json"]).stdout)
    assert as_json["file"] == str(SITES / f"{name}.yaml")
    del as_json["file"]
    assert site_from_record(as_json, "json") == site


def test_sites_are_read_without_torch_and_numpy() -> None:
    code = (
        "import sys, rookery.sites, slurm.limits; from slurm.site import load_site; load_site('lumi');"
        "sys.exit(' '.join({'torch', 'numpy', 'deepspeed'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
