"""Asks a real llama.cpp, in a process of its own: a file that it cannot bear ends that process, not ours.

Run as a script with a question's file and the answer's: it imports nothing of Tunesmith.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Tokenize texts and continue prompts greedily.

    Args:
        question: ``model`` (the file), ``adapter`` (a GGUF adapter, or None), ``texts``, ``prompts`` (token ids
            each), ``new_tokens``, ``likeliest`` (how many tokens' probabilities to give), ``window`` and ``threads``.

    Returns:
        ``engine``; ``texts``, the token ids of each; ``prompts``, for each the text and a list of
        (token, [(token, natural logarithm of its probability), ...]), where the second is empty for a token that ends
        within a character: the server tells nothing of those.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = question["model"]
    if question["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = question["adapter"], 1.0
        parameters.lora_adapters = [adapter]
    parameters.n_ctx = question["window"]
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = question["threads"]
    parameters.cpuparams_batch.n_threads = question["threads"]
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.fit_params = False
    parameters.offline = True
    parameters.verbosity = -1
    parameters.port = 0
    server = xllamacpp.Server(parameters)
    return {
        "engine": f"xllamacpp {xllamacpp.__version__}",
        "texts": [_tokens(server.listening_address, text) for text in question["texts"]],
        "prompts": [_continued(server.listening_address, prompt, question) for prompt in question["prompts"]],
    }


def _tokens(address: str, text: str) -> list[int]:
    reply = _post(f"{address}/tokenize", {"content": text, "add_special": False, "parse_special": True})
    return [int(token) for token in reply["tokens"]]


def _continued(address: str, prompt: list[int], question: dict[str, Any]) -> dict[str, Any]:
    """Token by token, so that every probability is known to be of its place."""
    text = ""
    tokens: list[tuple[int, list[list[float]]]] = []
    for _ in range(question["new_tokens"]):
        reply = _post(
            f"{address}/completion",
            {
                "prompt": prompt + [token for token, _ in tokens],
                "n_predict": 1,
                "temperature": 0.0,
                "samplers": ["temperature"],
                "n_probs": question["likeliest"],
                "post_sampling_probs": False,
                "return_tokens": True,
                "cache_prompt": True,
            },
        )
        text += reply["content"]
        steps = reply.get("completion_probabilities") or []
        likeliest = [[top["id"], top["logprob"]] for top in steps[0]["top_logprobs"]] if steps else []
        if not reply["tokens"]:
            break
        tokens.append((int(reply["tokens"][0]), likeliest))
        if reply.get("stop_type") == "eos":
            break
    return {"text": text, "tokens": tokens}


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310 - the address is our own server's
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:3])
    answered.write_text(json.dumps(answer(json.loads(asked.read_text("utf-8")))), "utf-8")
