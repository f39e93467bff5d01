"""New weights for running vLLM servers: each ends up with the new version, checked, or out of rotation."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jorch.export import adapter, probe
from jorch.serving import control

_RELOAD_TIMEOUT_S = 600.0


def push(urls: list[str], folder: Path, version: str, dtype: str) -> dict[str, str]:
    """Load `folder`, a model or an adapter as exported with its probe, into every server, all at once.

    Returns:
        What went wrong, by url: such a server goes on with what it had, or is gone, and must be given no more work.
    """
    if not urls:
        return {}
    expected = probe.read(folder)
    assert expected is not None, f"{folder} has no probe"
    with ThreadPoolExecutor(len(urls)) as threads:
        results = list(threads.map(lambda url: _push_one(url, folder, version, expected, dtype), urls))
    return {url: problem for url, problem in zip(urls, results, strict=True) if problem}


def _push_one(url: str, folder: Path, version: str, expected: probe.Probe, dtype: str) -> str | None:
    try:
        control.post(url, "/pause", mode="keep")
        try:
            _load_adapter(url, folder) if (folder / adapter.CONFIG).is_file() else _reload(url, folder)
            control.post(url, "/reset_prefix_cache")  # its keys and values belong to the old weights
            control.post(url, "/update_weight_version", {"new_version": version})
        finally:
            control.post(url, "/resume")
        scored = control.score(url, expected, salt=f"probe-{version}", tokens_only=True)
        probe.check(expected, scored, dtype, f"vLLM at {url}")
    except (ConnectionError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def _reload(url: str, folder: Path) -> None:
    _ask_workers(url, "jorch_reload", folder)


def _load_adapter(url: str, folder: Path) -> None:
    """In the place of the adapter before it. vLLM itself would take one that is not whole."""
    _ask_workers(url, "jorch_check_adapter", folder)
    body = {"lora_name": control.MODEL, "lora_path": str(folder), "load_inplace": True}
    control.post(url, "/v1/load_lora_adapter", body, timeout_s=_RELOAD_TIMEOUT_S)


def _ask_workers(url: str, method: str, folder: Path) -> None:
    body = {"method": method, "kwargs": {"folder": str(folder)}}
    answers = control.post(url, "/collective_rpc", body, timeout_s=_RELOAD_TIMEOUT_S)["results"]
    for answer in answers:
        if not answer["ok"]:
            raise ValueError(f"vLLM at {url} refused the weights in {folder}: {answer['error']}")
