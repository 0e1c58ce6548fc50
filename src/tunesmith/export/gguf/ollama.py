"""A Modelfile for Ollama, whose TEMPLATE shows what the model's chat template shows, or none at all.

Source: Ollama's ``docs/modelfile.mdx`` and ``parser/parser.go``.
"""

from __future__ import annotations

import math
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from tunesmith.checkpoint import read_json_object
from tunesmith.conversations import Message
from tunesmith.conversations.encode import render
from tunesmith.errors import CheckpointError, DataError
from tunesmith.export.gguf.go_chat import GoChat, Refused, Show, go_chat
from tunesmith.export.gguf.go_pieces import DATE_MARKS
from tunesmith.record import Finding, Record

MOST_CONTEXT = 8192  # memory for keys and values grows with it, and is taken when the model is loaded
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_MOST_LICENSE_BYTES = 64 << 10
_NAME_LENGTH = 80
# Dates come as their patterns, so that Go can fill in the day on which it is asked.
_DATES = "{%- macro strftime_now(format) -%}" + "{{ format }}".join(DATE_MARKS) + "{%- endmacro %}{{ '' }}"
_SHOWN = 160
_TRIAL_SECONDS = 600


class Modelfile(Record):
    """A Modelfile, and what of it is worth knowing.

    Attributes:
        text: its text, to be written beside the GGUF file as ``Modelfile``.
        template: the Go template in it.
        stops: texts that end an answer, besides the tokens that the GGUF file says.
        context_length: how many tokens of context it asks for; None where the model does not say how many it has.
        conversations: on how many conversations the Go template and the chat template were found equal.
        findings: what was decided, and what a person should know.
        name: what the model is called in the commands.
        commands: the commands that make the model known to Ollama and that talk to it, in the Modelfile's directory.
    """

    text: str = Field(repr=False)
    template: str = Field(repr=False)
    stops: tuple[str, ...]
    context_length: int | None
    conversations: int
    findings: tuple[Finding, ...]
    name: str
    commands: tuple[str, str]


class OllamaTrial(Record):
    """What an Ollama program made of a Modelfile.

    Attributes:
        program: its path.
        created: whether it took the Modelfile.
        template_equal: whether it keeps the same template; None where it took none.
        said: the end of what it said, where it failed.
    """

    program: str
    created: bool
    template_equal: bool | None
    said: str = ""

    @property
    def finding(self) -> Finding:
        """What is to be said of it."""
        if not self.created:
            return Finding(code="ollama_trial_failed", severity="error", params={"said": self.said})
        code = "ollama_trial_good" if self.template_equal else "ollama_trial_differs"
        return Finding(code=code, severity="ok" if self.template_equal else "warning", params={"said": self.said})


def modelfile_of(
    model_dir: Path,
    gguf_name: str,
    *,
    base: str | None = None,
    name: str | None = None,
    context_length: int | None = None,
    most_context: int = MOST_CONTEXT,
    adds_bos: bool | None = None,
) -> Modelfile:
    """Write the Modelfile of a GGUF file, from the model directory that it was made of.

    Args:
        model_dir: the directory: its tokenizer with the chat template, ``config.json``, ``generation_config.json``, and
            a LICENSE.
        gguf_name: the GGUF file's name; the Modelfile is to lie beside it.
        base: where the file is an adapter's: the base model, as Ollama knows it or as a GGUF file's path.
        name: what the model shall be called; None for the file's name.
        context_length: the model's window in tokens; None for what ``config.json`` says.
        most_context: the most tokens of context to ask for.
        adds_bos: whether the GGUF file tells llama.cpp to begin prompts with the beginning token by itself
            (``tokenizer.ggml.add_bos_token``); None for what the tokenizer does.

    Raises:
        CheckpointError: Ollama's templates cannot show what the chat template shows; or the directory is no model.
        DataError: a name that no Modelfile can hold, or a tokenizer without a chat template.
    """
    from tunesmith.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    source = _own_template(tokenizer)
    adds = _adds_bos(tokenizer) if adds_bos is None else adds_bos
    begin = str(tokenizer.bos_token or "") if adds else ""
    show = chat_shower(tokenizer, source)
    chat = go_chat(show, template=source, added=begin)
    if chat.source is None:
        raise _inexpressible(chat, model_dir)
    findings = list(_chat_findings(chat, source, begin, show))
    stops = _stops(tokenizer, show, findings, generation=_object(model_dir / _GENERATION))
    window = context_length or _window(model_dir)
    context = None if window is None else min(window, most_context)
    if window is not None and window > most_context:
        params = {"length": most_context, "window": window}
        findings.append(Finding(code="ollama_context_capped", severity="info", params=params))
    lines = [_from(gguf_name, base), f'TEMPLATE """{chat.source}"""']
    lines += [f"PARAMETER stop {_value(stop)}" for stop in stops]
    lines += [] if context is None else [f"PARAMETER num_ctx {context}"]
    lines += _sampling(_object(model_dir / _GENERATION))
    lines += _license(model_dir, findings)
    called = name or _called(gguf_name)
    return Modelfile(
        text="\n".join(lines) + "\n",
        template=chat.source,
        stops=stops,
        context_length=context,
        conversations=chat.conversations,
        findings=tuple(findings),
        name=called,
        commands=(f"ollama create {shlex.quote(called)} -f Modelfile", f"ollama run {shlex.quote(called)}"),
    )


def try_ollama(folder: Path, modelfile: Modelfile, *, program: str = "ollama") -> OllamaTrial | None:
    """Give a Modelfile to Ollama under a name of its own, read back what became of the template, and remove it again.

    Args:
        folder: the directory that holds ``Modelfile`` and the GGUF file.
        modelfile: what was written there.
        program: the program's name on PATH, or its path.

    Returns:
        What came of it; None where there is no such program.
    """
    found = shutil.which(program)
    if found is None:
        return None
    name = f"tunesmith-try-{secrets.token_hex(4)}"
    created, said = _asked([found, "create", name, "-f", "Modelfile"], folder)
    if not created:
        return OllamaTrial(program=found, created=False, template_equal=None, said=said[-_SHOWN * 4 :])
    try:
        shown, said = _asked([found, "show", "--template", name], folder)
    finally:
        _asked([found, "rm", name], folder)
    equal = shown and said.removesuffix("\n") == modelfile.template
    return OllamaTrial(program=found, created=True, template_equal=equal, said="" if equal else said[-_SHOWN * 4 :])


def _asked(command: list[str], folder: Path) -> tuple[bool, str]:
    """Whether a command succeeded, and what it said."""
    try:
        done = subprocess.run(  # noqa: S603 - Ollama, which the user has put on PATH
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TRIAL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout if done.returncode == 0 else done.stderr.strip() or done.stdout


# The chat template.


def _own_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        render(tokenizer, (), add_generation_prompt=True)  # says that there is none
        raise DataError("This tokenizer has several chat templates, and none of them is the default one.")
    return template


def chat_shower(tokenizer: Any, source: str) -> Show:
    """The chat template as :func:`go_chat` asks it; whatever stops it counts as a refusal."""
    template = _DATES + source if "strftime_now" in source else source

    def show(turns: Sequence[Message], asks: bool) -> str:
        if any(mark in source for mark in DATE_MARKS):
            raise Refused
        try:
            return render(tokenizer, turns, add_generation_prompt=asks, chat_template=template)
        except Exception as error:  # a template is a program: it may stop with anything
            raise Refused from error

    return show


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _inexpressible(chat: GoChat, model_dir: Path) -> CheckpointError:
    shown = [] if chat.wants is None and chat.gives is None else [f"turns: {', '.join(chat.roles)}"]
    return CheckpointError(
        "Ollama's templates cannot show what this model's chat template shows, so no Modelfile was written.",
        where=model_dir,
        expected=_end(chat.wants),
        found=_end(chat.gives),
        details=shown,
        next_step="run the GGUF file with llama.cpp (llama-server --jinja), which reads the chat template in the file",
    )


def _end(text: str | None) -> str | None:
    return None if text is None else repr(text if len(text) <= _SHOWN else "…" + text[-_SHOWN:])


def _chat_findings(chat: GoChat, source: str, begin: str, show: Show) -> list[Finding]:
    findings = [
        Finding(code="ollama_template_equal", severity="ok", params={"conversations": chat.conversations}),
    ]
    if chat.refuses_system:
        findings.append(Finding(code="ollama_refuses_system", severity="info"))
    if chat.dated or chat.loops:
        params = {"version": "0.11.1" if chat.dated else "0.5.13"}
        findings.append(Finding(code="ollama_needs_version", severity="info", params=params))
    if begin and not show((Message(role="user", content="a"),), True).startswith(begin):
        findings.append(Finding(code="ollama_extra_bos", severity="warning", params={"token": begin}))
    if "tools" in source:
        findings.append(Finding(code="ollama_without_tools", severity="info"))
    return findings


# The lines.


def _stops(tokenizer: Any, show: Show, findings: list[Finding], *, generation: dict[str, Any]) -> tuple[str, ...]:
    """What ends an answer and is not the one end token that the GGUF file names."""
    listed = generation.get("eos_token_id")
    ids = [index for index in listed if isinstance(index, int)] if isinstance(listed, list) else []
    ends = [tokenizer.convert_ids_to_tokens(index) for index in ids]
    turn_end = _turn_end(tokenizer, show)
    known = tokenizer.eos_token
    if turn_end is None and known is None:
        findings.append(Finding(code="ollama_no_stop", severity="warning"))
    stops = dict.fromkeys(end for end in (turn_end, *ends) if isinstance(end, str) and end and end != known)
    return tuple(stop for stop in stops if _holds(stop))


def _turn_end(tokenizer: Any, show: Show) -> str | None:
    """What stands after an answer: its special token, or what the next user's turn begins with."""
    answer = "aNs1text"
    turns = [Message(role="user", content="uSr1text"), Message(role="assistant", content=answer)]
    try:
        after = show([*turns, Message(role="user", content="uSr2text")], True).partition(answer)[2]
    except Refused:
        return None
    after = after.partition("uSr2text")[0]
    special: list[str] = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    first = min((token for token in special if token in after), key=after.index, default=None)
    if first is not None and not after[: after.index(first)].strip():
        return first
    return after.strip() or None


def _from(gguf_name: str, base: str | None) -> str:
    if not gguf_name or "/" in gguf_name or "\\" in gguf_name or not gguf_name.isprintable():
        raise DataError(
            "No Modelfile can hold this file name.",
            where=repr(gguf_name),
            expected="a name without slashes, line breaks and other characters that are not printed",
            next_step="choose another --out",
        )
    file = _value(f"./{gguf_name}")
    if base is None:
        return f"FROM {file}"
    if not base.strip() or not base.isprintable():
        raise DataError("No Modelfile can hold this name of a base model.", where=repr(base))
    return f"FROM {_value(base)}\nADAPTER {file}"


def _holds(text: str) -> bool:
    """Whether a Modelfile's reader keeps every character: it drops those that Go does not print."""
    return '"""' not in text and not text.startswith('"') and not text.endswith('"') and _is_kept(text)


def _is_kept(text: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in text)


def _value(text: str) -> str:
    """A value as a Modelfile's reader takes it: it knows no escapes."""
    if "\n" in text and '"' in text:
        return f'"""{text}"""'
    return f'"{text}"' if text != text.strip() or re.search(r"[\s<]", text) or text.startswith('"') else text


def _window(model_dir: Path) -> int | None:
    config = _object(model_dir / _CONFIG)
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in _WINDOWS:
            if isinstance(place.get(key), int) and place[key] > 0:
                return int(place[key])
    return None


def _sampling(generation: dict[str, Any]) -> list[str]:
    lines = []
    for key, parameter in _SAMPLING.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            lines.append(f"PARAMETER {parameter} {int(value) if key == 'top_k' else value}")
    return lines


def _license(model_dir: Path, findings: list[Finding]) -> list[str]:
    for name in _LICENSES:
        file = model_dir / name
        if not file.is_file():
            continue
        data = file.read_bytes()[: _MOST_LICENSE_BYTES + 1]
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = ""
        if text and len(data) <= _MOST_LICENSE_BYTES and '"""' not in text:
            return [f'LICENSE """{text.rstrip()}\n"""']
        findings.append(Finding(code="ollama_license_left_out", severity="info", params={"name": name}))
        return []
    return []


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return dict(read_json_object(path)) if path.is_file() else {}


def _called(gguf_name: str) -> str:
    """A name as Ollama allows them: letters, digits, ``_``, ``-`` and ``.``."""
    stem = re.sub(r"[^a-z0-9_.-]+", "-", gguf_name.removesuffix(".gguf").lower()).strip("-.")
    return stem[:_NAME_LENGTH] or "model"
