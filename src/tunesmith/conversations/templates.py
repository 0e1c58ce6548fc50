"""Chat templates by the names that LLaMA-Factory gives them: facts of formats, rendered as one Jinja template.

``templates.json`` holds the facts.  ``{content}`` stands for a turn's text, ``{bos}`` and ``{eos}`` for the tokenizer's
own tokens, where it has them.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from importlib import resources
from typing import Any

from pydantic import Field

from tunesmith.conversations.encode import render
from tunesmith.conversations.records import Message
from tunesmith.errors import DataError
from tunesmith.record import Finding, Part

_MARK = re.compile(r"\{(content|bos|eos)\}")
# What looks like a token of its own: <|im_end|>, [INST], <｜User｜>.
_TOKEN_LIKE = re.compile(r"<[|｜/]?[^<>\s]{1,40}>|\[/?[A-Z|][A-Za-z_|]{2,30}\]")
_REFUSED = {"empty": "it ends answers with nothing, so the model would never stop"}
_SUGGESTED = 5
_ANSWER = "§"  # what no template writes itself
# What two templates are compared on.
_PROBES = (
    (("user", "ab"), ("assistant", "cd")),
    (("system", "s t"), ("user", "ab"), ("assistant", "cd")),
    (("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")),
    (("system", "s t"), ("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")),
    (
        ("user", "ab"),
        ("assistant", "<think>\nx\n</think>\n\ncd"),
        ("user", "ef"),
        ("assistant", "<think>\ny\n</think>\n\ngh"),
    ),
)


class _Format(Part):
    """How one format writes a conversation.

    Attributes:
        like: the format whose facts hold where this one states none.
        prefix: what comes before everything.
        system: the system's text.
        user: a user's turn.
        header: what the model's answer is written after.
        answer: the answer with its end.
        eos_after_last: whether the last answer alone ends with the tokenizer's end-of-sequence token.
        default_system: the system's text where a conversation has none.
        system_in_user: whether the system's text is a part of the first user's turn.
        thought: what opens and closes a thought; past thoughts are not shown, and an answer without one has an empty
            one.
        no_thought: the empty thought, where that is not both of these.
    """

    like: str | None = None
    prefix: str = ""
    system: str = "{content}"
    user: str = "{content}"
    header: str = ""
    answer: str = "{content}{eos}"
    eos_after_last: bool = False
    default_system: str = ""
    system_in_user: bool = False
    thought: tuple[str, str] | None = None
    no_thought: str | None = None

    @property
    def texts(self) -> str:
        """All that it writes itself."""
        return self.prefix + self.system + self.user + self.header + self.answer


_END_CHANGED = "template_end_made_eos"


class NamedTemplate(Part):
    """The chat template that a run trains with, and what of it is worth knowing.

    Attributes:
        name: as the recipe names it; None where that is the tokenizer's own.
        chat_template: the Jinja template.
        own: whether it is the tokenizer's own: none was named, or that renders the same texts.
        eos_token: the token that ends an answer, as the tokenizer should know it; None where it ends with none.
        findings: what was decided.
    """

    name: str | None
    chat_template: str = Field(repr=False)
    own: bool
    eos_token: str | None
    findings: tuple[Finding, ...] = ()

    @property
    def ends_otherwise(self) -> bool:
        """Whether an answer ends with a token that generation did not stop at before."""
        return any(finding.code == _END_CHANGED for finding in self.findings)

    def fit(self, tokenizer: Any) -> None:
        """Give the tokenizer this template and this end, in place; padding is the end token where there was none."""
        if not self.own:
            tokenizer.chat_template = self.chat_template
        if self.eos_token is not None and tokenizer.eos_token != self.eos_token:
            tokenizer.eos_token = self.eos_token
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token


def template_names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(_formats())


def chat_template_of(name: str, tokenizer: Any, *, default_system: str | None = None, thinking: bool = True) -> str:
    """The Jinja template of a named format.

    Args:
        name: one of :func:`template_names`.
        tokenizer: its beginning and end tokens are written into the template.
        default_system: the system's text where a conversation has none; None keeps the format's own.
        thinking: for formats with thoughts, whether an answer may hold one; else an empty one belongs to the prompt.

    Raises:
        DataError: the name is unknown; the nearest ones are suggested.
    """
    return _jinja(_format(name, tokenizer), tokenizer, default_system=default_system, thinking=thinking)


def named_template(
    tokenizer: Any,
    name: str | None,
    *,
    default_system: str | None = None,
    thinking: bool | None = True,
    stop_ids: tuple[int, ...] = (),
) -> NamedTemplate:
    """Decide which chat template a tokenizer trains with, and with which token an answer ends.

    The tokenizer's own template is kept where it renders what the named one would, for it may do more (tools).  Where
    it does not, the named one is trained with; it must then be saved, or what answers elsewhere sees other prompts.
    A tokenizer whose end token is another than the template's gets the template's, as a model that ends its answers
    with a token that nothing stops at never stops.

    Args:
        tokenizer: a fast tokenizer; it stays as it is.
        name: one of :func:`template_names`, or None for the tokenizer's own.
        default_system: as in :func:`chat_template_of`.
        thinking: likewise; None, which lets every row choose, is more than one template can say.
        stop_ids: further tokens that generation stops at, as the base model's ``generation_config`` lists them.

    Raises:
        DataError: an unknown name, no template at all, or one whose end token the tokenizer does not know.
    """
    own = _own_template(tokenizer)
    findings: list[Finding] = []
    if name is None:
        template = _only_own(tokenizer, own, thinking=thinking)
    else:
        template, said = _wanted(tokenizer, own, name, default_system=default_system, thinking=thinking)
        findings += said
    end = _end_token(tokenizer, template, name)
    if end is None:
        findings.append(Finding(code="template_without_end", severity="warning"))
    elif end != tokenizer.eos_token and tokenizer.convert_tokens_to_ids(end) not in stop_ids:
        params = {"token": end, "before": tokenizer.eos_token}
        findings.append(Finding(code=_END_CHANGED, severity="info", params=params))
    else:
        end = tokenizer.eos_token
    return NamedTemplate(
        name=name, chat_template=template, own=template == own, eos_token=end, findings=tuple(findings)
    )


def _wanted(
    tokenizer: Any, own: str | None, name: str, *, default_system: str | None, thinking: bool | None
) -> tuple[str, list[Finding]]:
    """The template of that name, or the tokenizer's own where that says the same."""
    if thinking is None and _format(name, tokenizer).thought is not None:
        raise DataError(
            "Whether answers hold thoughts must be the same for all rows.",
            where="enable_thinking",
            expected="true or false",
            found="null",
        )
    wanted = chat_template_of(name, tokenizer, default_system=default_system, thinking=thinking is not False)
    if own is None:
        return wanted, [Finding(code="template_given", severity="ok", params={"name": name})]
    if _render_alike(tokenizer, own, wanted):
        return own, []
    return wanted, [Finding(code="template_replaced", severity="warning", params={"name": name})]


def _only_own(tokenizer: Any, own: str | None, *, thinking: bool | None) -> str:
    """The tokenizer's own template, where the recipe names none."""
    if own is None:
        raise DataError(
            "This tokenizer has no chat template, so the recipe must name one.",
            where=getattr(tokenizer, "name_or_path", None) or "template",
            expected=f"a name that fits its tokens: {', '.join(_fitting(tokenizer))}",
            next_step="put template: NAME into the recipe",
        )
    if thinking is not True and "enable_thinking" in own:
        raise DataError(
            "Without thoughts, the tokenizer's own template is another one, which the recipe must name.",
            where="enable_thinking",
            expected="true, or a template by its name",
            found="false" if thinking is False else "null",
            next_step="put template: NAME into the recipe, such as qwen3",
        )
    return own


@cache
def _formats() -> dict[str, _Format]:
    text = (resources.files("tunesmith.conversations") / "templates.json").read_text(encoding="utf-8")
    facts: dict[str, dict[str, Any]] = json.loads(text)
    return {
        name: _Format.model_validate((facts[own["like"]] if "like" in own else {}) | own)
        for name, own in sorted(facts.items())
    }


def _format(name: str, tokenizer: Any) -> _Format:
    found = _formats().get(name)
    if found is None:
        near = [] if name in _REFUSED else difflib.get_close_matches(name, _formats(), n=3, cutoff=0.5)
        raise DataError(
            f"The template {name!r} is refused: {_REFUSED[name]}."
            if name in _REFUSED
            else f"There is no template {name!r}.",
            where="template",
            expected=f"one of {', '.join(near or _fitting(tokenizer))}, or the key left out for the tokenizer's own",
            next_step=f"did you mean {near[0]}?" if near else None,
        )
    return found


def _fitting(tokenizer: Any) -> list[str]:
    """Names of formats whose tokens the tokenizer knows, those with most of them first."""
    vocabulary = tokenizer.get_vocab()
    fitting = []
    for name, written in _formats().items():
        tokens = set(_TOKEN_LIKE.findall(written.texts.replace("{content}", " ")))
        if tokens <= vocabulary.keys():
            fitting.append((-len(tokens), written.like is not None, name))
    return [name for *_, name in sorted(fitting)[:_SUGGESTED]]


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _jinja(written: _Format, tokenizer: Any, *, default_system: str | None, thinking: bool) -> str:
    """The template of a format; every line strips the line break before it."""
    tokens = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
    system = _expression(written.system, tokens, "ns.system")
    content = f"({system} if loop.first and ns.system else '') ~ content" if written.system_in_user else "content"
    header = _expression(written.header, tokens, "''")
    asked = written.header + ("" if thinking or not written.thought else _no_thought(written))
    lines = [
        _said(_expression(written.prefix, tokens, "''")),
        "{%- set ns = namespace(system="
        + _literal(written.default_system if default_system is None else default_system)
        + ") %}",
        "{%- if messages and messages[0]['role'] == 'system' %}",
        "{%- set turns = messages[1:] %}",
        "{%- if messages[0]['content'] %}{%- set ns.system = messages[0]['content'] %}{%- endif %}",
        "{%- else %}{%- set turns = messages %}{%- endif %}",
        "" if written.system_in_user else "{%- if ns.system %}" + _said(system) + "{%- endif %}",
        "{%- for turn in turns %}",
        "{%- set content = turn['content'] %}",
        "{%- if turn['role'] == 'user' %}",
        _said(_expression(written.user, tokens, content)),
        "{%- elif turn['role'] == 'assistant' %}",
        _said(header),
        *_thought_lines(written, thinking=thinking),
        _said(_expression(written.answer, tokens, "content")),
        "{%- if loop.last %}" + _said(_literal(tokens["eos"])) + "{%- endif %}" if written.eos_after_last else "",
        "{%- else %}",
        "{{- raise_exception('only a first system turn, user and assistant turns can be shown') }}",
        "{%- endif %}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}" + _said(_expression(asked, tokens, "''")) + "{%- endif %}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _thought_lines(written: _Format, *, thinking: bool) -> list[str]:
    """No thought but the last answer's, and an empty one where that has none."""
    if written.thought is None:
        return []
    opened, closed = (_literal(word.strip()) for word in written.thought)
    past = f"{{%- set content = content.split({closed})[-1].lstrip('\\n') %}}"
    empty = _said(_literal(_no_thought(written)))
    if not thinking:
        return [f"{{%- if {closed} in content %}}{past}{{%- endif %}}", f"{{%- if loop.last %}}{empty}{{%- endif %}}"]
    return [
        f"{{%- if not loop.last %}}{{%- if {closed} in content %}}{past}{{%- endif %}}",
        f"{{%- elif {opened} not in content and {closed} not in content %}}{empty}{{%- endif %}}",
    ]


def _no_thought(written: _Format) -> str:
    return written.no_thought if written.no_thought is not None else "".join(written.thought or ())


def _said(expression: str) -> str:
    return "" if expression in ("", "''", '""') else f"{{{{- {expression} }}}}"


def _literal(text: str) -> str:
    """A text as Jinja writes it; JSON's escapes are among its own."""
    return json.dumps(text, ensure_ascii=False)


def _expression(text: str, tokens: dict[str, str], content: str) -> str:
    """A slot as a Jinja expression: its own texts, and ``content`` where the turn's text stands."""
    parts, own = [], ""
    for place, piece in enumerate(_MARK.split(text)):
        if place % 2 and piece == "content":
            parts += [_literal(own)] if own else []
            parts.append(content)
            own = ""
        else:
            own += tokens[piece] if place % 2 else piece
    return " ~ ".join(parts + ([_literal(own)] if own else []))


def _end_token(tokenizer: Any, template: str, name: str | None) -> str | None:
    """The special token that a template ends an answer with; None where the tokenizer's own ends it with none."""
    from jinja2 import TemplateError

    asked = (Message(role="user", content="a"),)
    whole = (*asked, Message(role="assistant", content=_ANSWER))
    try:
        start = render(tokenizer, asked, add_generation_prompt=True, chat_template=template)
        text = render(tokenizer, whole, add_generation_prompt=False, chat_template=template)
    except TemplateError as error:
        raise DataError(
            "The tokenizer's own chat template shows no conversation.",
            where=getattr(tokenizer, "name_or_path", None),
            found=error,
            next_step="put template: NAME into the recipe",
        ) from error
    end = text.removeprefix(start).rpartition(_ANSWER)[2]
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = next((special[index] for index in reversed(ids) if index in special), None)
    if found is None and name is not None:
        raise DataError(
            f"This tokenizer has no token of its own for what the template {name!r} ends an answer with, "
            "so a model would never stop.",
            where="template",
            expected=f"a name that fits its tokens: {', '.join(_fitting(tokenizer))}",
            found=repr(end),
        )
    return found


def _render_alike(tokenizer: Any, one: str, other: str) -> bool:
    """Whether two templates make the same texts; after the last turn, blank ends do not count."""
    from jinja2 import TemplateError

    for probe in _PROBES:
        turns = tuple(Message(role=role, content=content) for role, content in probe)
        for shown, asks in ((turns, False), (turns[:-1], True)):
            try:
                texts = [
                    render(tokenizer, shown, add_generation_prompt=asks, chat_template=template)
                    for template in (one, other)
                ]
            except TemplateError:
                return False
            if texts[0] != texts[1] and (asks or texts[0].rstrip() != texts[1].rstrip()):
                return False
    return True
