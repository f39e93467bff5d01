"""vLLM's /v1/completions in the terms of its token endpoint, for servers that do not offer that one."""

from typing import Any

PATH = "/v1/completions"


def to_completions(body: dict[str, Any], url: str) -> dict[str, Any]:
    """A request to /inference/v1/generate, as one to /v1/completions.

    Raises ValueError where its log-probabilities would be of another distribution than the tokens were drawn from: the
    server may give those of temperature 1.
    """
    sampling = body["sampling_params"]
    if sampling["temperature"] not in (0.0, 1.0):
        raise ValueError(
            f"vLLM at {url} has no token endpoint, and its completions need not have the log-probabilities of "
            f"temperature {sampling['temperature']:g}: start it with `jorch serve --rl`, or set rollout.temperature=1"
        )
    kept = {key: body[key] for key in ("model", "cache_salt")}
    return kept | sampling | {"prompt": body["token_ids"], "return_token_ids": True}


def to_choice(choice: dict[str, Any], version: str, url: str) -> dict[str, Any]:
    """A choice of /v1/completions as one of /inference/v1/generate. All tokens get `version`: the server tells none.

    Raises ValueError where it holds no token ids.
    """
    token_ids = choice.get("token_ids")
    if token_ids is None:
        raise ValueError(f"vLLM at {url} does not know return_token_ids: use a newer one, or `jorch serve --rl`")
    return {
        "finish_reason": choice["finish_reason"],
        "token_ids": token_ids,
        "logprobs": {"content": [{"logprob": value} for value in choice["logprobs"]["token_logprobs"]]},
        "weight_versions": [{"version": version, "start": 0, "end": len(token_ids)}],
    }
