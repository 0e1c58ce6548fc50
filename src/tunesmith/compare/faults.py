"""What can be wrong with a reply for all to see, without knowing the right one: in English and in Chinese.

Where a fault cannot be told from what was asked for (a repetition, a translation, a letter of refusal), it is none:
a rate of faults is to be believed where it is high.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import groupby, islice
from operator import eq

from tunesmith.record import Part

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^<>\s]{1,40}\uff5c>|</?(?:s|pad|unk|bos|eos|think)>|\[PAD\]")


class Faults(Part):
    """What is wrong with one reply.

    Attributes:
        refused: it begins by declining, and does not help after that.
        empty: it holds nothing but spaces, punctuation and special tokens.
        repeats: it goes round in a loop.
        switched_language: it is written in Latin letters where the question is in Chinese, or the other way round.
        cut: the limit of tokens ended it.
    """

    refused: bool = False
    empty: bool = False
    repeats: bool = False
    switched_language: bool = False
    cut: bool = False


def faults_of(question: str, reply: str, stop_reason: str) -> Faults:
    """Find what is wrong with a reply.  The time grows with its length only, whatever it holds.

    Args:
        question: the last user turn; what it asks for is no fault.
        reply: the answer, with or without special tokens; a thought before it (``<think>``) does not count.
        stop_reason: why it ended; ``length`` where the limit ended it.
    """
    answer = _without_thought(reply)
    return Faults(
        refused=_refused(question, answer),
        empty=_empty(answer),
        repeats=_repeats(question, reply),
        switched_language=_switched_language(question, answer),
        cut=stop_reason == "length",
    )


def _without_thought(reply: str) -> str:
    thought, end, answer = reply.partition("</think>")
    return answer if end and thought.lstrip().startswith("<think>") else reply


# --- empty


def _empty(answer: str) -> bool:
    text = _SPECIAL_TOKEN.sub("", answer)
    # An operator can be the whole answer, and is then written as code.
    return not (any(map(_says_something, text)) or re.search(r"`[^`\s]{1,20}`", text))


def _says_something(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] in "LN" or (kind in ("Sm", "Sc", "So") and not character.isascii() and character != "\ufffd")


# --- refused

# Each matches at one place only and within bounds: what may stand before a refusal, and the refusal.
_AI = r"(?:ai|artificial\sintelligence|(?:large\s)?language\smodel|(?:virtual\s|digital\s)?assistant|chatbot)\b"
_AI_ZH = "(?:ai|人工智能|语言模型|大模型|助手|助理|机器人|程序)"
_BEFORE_EN = re.compile(
    rf"""(?:
      (?:(?:i|we)(?:'m|'re|\ am|\ are)\ )?(?:(?:so|very|really|truly|deeply|terribly)\ )?sorry(?:\ about\ that)?
    | (?:(?:i|we)\ )?(?:do\ )?(?:sincerely\ )?apologi[sz]e(?:\ for\ (?:the|any|this)\ \w+)?
    | (?:my\ (?:sincere\ )?)?apologies
    | unfortunately|regrettably|(?:i|we)\ regret\ (?:that|to\ (?:say|inform\ you)(?:\ that)?)
    | (?:i'm|i\ am|we're)\ afraid(?:\ that)?
    | (?:(?:as|being|i'm|i\ am)\ )(?:just\ |only\ |merely\ )?an?\ (?:[\w-]+\ ){{0,3}}?{_AI}[^.,;!?\n]{{0,80}}?
        (?:\ and\b|[.,;]|(?=\ (?:i|we)\b))
    | (?:i'm|i\ am)\ (?:programmed|designed|trained|built|made)\ to\ [^.!?\n]{{0,80}}?[.,]
    | i\ (?:completely\ |fully\ )?(?:understand|appreciate|realize|realise|know|see)\b[^.!?\n]{{0,160}}?
        (?:,?\ but\b|[.!?,])
    | i\ (?:must|have\ to)\ (?:inform|tell)\ you(?:\ that)?|thank(?:s|\ you)[^.!?,\n]{{0,60}}
    | hello(?:\ there)?|hi(?:\ there)?|hey|dear\ user|no(?:pe)?|but|however|that\ said|so
    )(?=[^\w']|\Z)[\s,.;:!—–-]*""",
    re.VERBOSE,
)
_BEFORE_ZH = re.compile(
    rf"""(?:
      (?:我|我们)?(?:感到|深感|表示)?(?:非常|很|十分|真的|真是|实在|万分)?(?:抱歉|对不起|不好意思|遗憾)[哦呀啊]?
        (?:地[^，。\n]{{0,6}})?
    | (?:您|你)好|尊敬的用户|亲(?:爱的用户)?|(?:非常|十分)?(?:感谢|谢谢)(?:您|你)[^，。！!\n]{{0,20}}
    | 我?(?:完全|非常)?(?:理解|明白|知道|了解)[^。！？\n]{{0,60}}?(?:，但是?|。|，不过)
    | (?:作为|身为|我(?:只|仅仅|仅)?是)(?:一[个名款位])?[^，。\n]{{0,20}}?{_AI_ZH}
        [^，。\n]{{0,12}}?(?=[，,。]|我|不能|无法|没有|不)
    | (?:根据|按照|由于|因为|出于|鉴于)[^。\n]{{0,40}}?，
    | (?:对于|关于|针对)?(?:这个?|该|您的?|你的?|此类?|这类|这种|这样的?)[^，。\n]{{0,8}}?，?
        (?=我?(?:暂时|目前|真的|恐怕|确实)?(?:无法|不能|不便|没办法|帮不了|拒绝))
    | 但是?|不过|然而|因此|所以
    )[\s，,。.！!：:～~…、]*""",
    re.VERBOSE,
)
_SELF = r"(?:i|we)(?:\ (?:really|simply|just|must|personally|currently|also|therefore))?"
_CANNOT = (
    r"(?:\ ?(?:can't|cannot|can\ not)(?:\ and\ (?:won't|will\ not))?|\ (?:won't|will\ not)\ be\ able\ to"
    r"|\ (?:do\ not|don't)\ (?:think|believe)\ (?:that\ )?i\ (?:can|should|am\ able\ to)"
    r"|(?:'m|'re|\ am|\ are)\ (?:currently\ |simply\ )?"
    r"(?:unable|not\ (?:able|allowed|permitted|authorized|designed|programmed|willing|comfortable|going))\ (?:to|with)"
    r"|\ (?:do\ not|don't)\ (?:have\ the\ (?:ability|capability|capacity)\ to|feel\ comfortable))"
)
_DOING = (
    r"(?:(?:to|in\ good\ conscience|ethically|directly|actually|be\ able\ to|legally|help\ you|offer\ to)[\ ,]+){0,3}"
)
_NOT_THE_USER = r"(?!help\ it\b|\w+\ (?:but|him|her|them|myself|feeling|thinking|wondering|noticing|for\ my)\b)"
_SERVICE = (
    r"(?:help(?:ing)?|assist(?:ing)?|provid(?:e|ing)|fulfil|comply|do\ (?:that|this|so)\b|answer(?:ing)?|creat(?:e|ing)"
    r"|write|writing|generat(?:e|ing)|produce|engag(?:e|ing)|participate|support|discuss(?:ing)?|shar(?:e|ing)"
    r"|offer(?:ing)?|complete|continue\ (?:this|with)|respond(?:ing)?|giv(?:e|ing)\ (?:you|advice|instructions)|advise"
    r"|(?:accommodate|process|perform|facilitate|promote|encourage|condone|endorse)|translate|carry\ out)"
)
_REFUSAL_EN = re.compile(
    rf"""{_SELF}(?:{_CANNOT}\ {_DOING}{_NOT_THE_USER}{_SERVICE}
    |(?:\ must|\ have\ to|\ will\ have\ to|'ll\ have\ to)?\ (?:respectfully\ |politely\ )?decline\b)
    |(?:that|this)(?:'s|\ is)\ (?:not\ something|something)\ (?:that\ )?i\ (?:can't|cannot|can|won't|am\ able)
    |it(?:'s|\ is|\ would\ be)\ (?:not\ appropriate|inappropriate|unethical|not\ possible|impossible)\ for\ me\ to
    |{_SELF}\ (?:won't|will\ not)\ (?:help|assist|answer|comply|participate|do\ (?:that|this)|provide\ (?:that|this))\b
    |(?:i'd|i\ would)\ rather\ not\ (?:answer|discuss|say|help|share|do)\b
    |it(?:'s|\ is)\ against\ my\ (?:programming|guidelines|policy|policies|principles)
    |your\ request\ (?:cannot|can't|could\ not)\ be\ (?:processed|fulfilled|answered|completed)
    |my\ (?:guidelines|programming|policies|instructions)\ (?:prevent|prohibit|forbid|do\ not\ allow|don't\ allow)
    |(?:this|that|your)\ (?:request|question|content|topic)\ (?:violates|goes\ against|is\ against)\ (?:my|our|the)""",
    re.VERBOSE,
)
# Only after an apology or "as an AI": alone these begin many a harmless sentence.
_REFUSAL_AFTER_EN = re.compile(
    rf"""{_SELF}(?:{_CANNOT}|\ ?(?:won't|will\ not|couldn't|could\ not))\ ?(?:{_DOING}{_NOT_THE_USER}(?:{_SERVICE}
    |tell\ you|say|explain|make|recommend|suggest|describe|teach|speculate|comment|do\b|give|express|form|hold)
    |[.!]|\Z)""",
    re.VERBOSE,
)
# What a model lacks.  With "but" it goes on to help; alone it is all that the user gets.
_LACKS_EN = re.compile(
    rf"""{_SELF}(?:(?:{_CANNOT})\ (?:access|browse|predict|verify|experience|feel\ (?:emotions|pain)
    |(?:see|view|open|hear|play)\ (?:(?:any|the|your|this|external)\ )?
        (?:image|picture|photo|file|link|video|audio|screen|attach))
    |\ (?:do\ not|don't)\ (?:actually\ )?(?:have|possess|hold)\ (?:the\ ability|access|any\ |personal|real-time|feelings
    |emotions|opinions|beliefs|preferences|consciousness|a\ physical|enough\ information))""",
    re.VERBOSE,
)
_REFUSAL_ZH = re.compile(
    r"""(?:我们?|本助手|本人|小助手|本系统)(?:暂时|目前|恐怕|真的|确实|也|并|还|是|现在){0,2}
    (?:无法|不能|没办法|没法|没有办法|不可以|不便|不太?方便|拒绝|没有权限|没有能力|不具备)[^，。！？\n]{0,14}?
    (?:提供|回答|帮助|帮您|帮你|协助|满足|处理|生成|编写|创作|讨论|参与|执行|回应|回复|透露|分享|作答|撰写|为您|为你|给您|给你
    |解答|写|讲述|描述|支持这|进行这|继续这|完成这|完成您|完成你|按照您|按照你|这样做|这么做|答应|鼓励)
    |(?:这个?|该|您的?|你的?|此)(?:问题|请求|要求|内容|话题)[^，。\n]{0,10}(?:涉及|违反|不符合|超出)[^。\n]{0,40}
    (?:无法|不能|不便|换个?一?个?话题)
    |(?:让|要不)?(?:我们|咱们)(?:还是)?(?:换个|换一个|聊点|聊聊)(?:别的|其他|话题)""",
    re.VERBOSE,
)
_REFUSAL_AFTER_ZH = re.compile(
    r"""(?:我们?|本助手|本人|小助手|本系统)?(?:暂时|目前|恐怕|真的|确实|也|并|还|是|现在){0,2}
    (?:无法|不能|没办法|没法|没有办法|不可以|不便|不太?方便|不会|不应该?|拒绝|没有权限|没有能力|不具备|不被允许)
    (?:[^，。！？\n]{0,14}?(?:提供|回答|帮|协助|满足|完成|处理|生成|编写|创作|讨论|支持|给出|参与|执行|回应|回复|透露|分享
    |作答|撰写|为您|为你|给您|给你|进行|解答|告诉|写|讲|描述|推荐|评论|评价|发表|做这|做到|这样做|这么做|答应|教|鼓励|预测|说|聊|替您|替你)
    |[。！!]|\Z)
    |(?:我还?)?(?:没有?学会|不会|不知道)(?:如何|怎么|怎样)[^，。\n]{0,6}回答
    |[^，。\n]{0,6}(?:请求|问题|内容)[^，。\n]{0,10}(?:违反|不符合|涉及)
    |(?:(?:这个?|这件|此)(?:事|忙)?)?我?(?:帮不了|帮不上|爱莫能助)""",
    re.VERBOSE,
)
_LACKS_ZH = re.compile(
    r"""(?:我们?|本助手)?(?:目前|暂时|本身|并|也|还)?(?:(?:无法|不能|没法)(?:直接|实时)?(?:访问|查看|看到|浏览|打开|联网|获取|感受|听)
    |(?:没有|不具备|不具有)[^，。\n]{0,6}?(?:权限|情感|感情|观点|感受|意见|看法|偏好|实时|意识|体验|经历|身体))""",
    re.VERBOSE,
)
_APOLOGY = re.compile(r"sorry|apolog|unfortunately|regret|afraid|抱歉|对不起|不好意思|遗憾")
_AI_ITSELF = re.compile(
    rf"\b(?:as|being|i'm|i am) (?:just |only |merely )?an? (?:[\w-]+ ){{0,3}}?{_AI}"
    rf"|(?:作为|身为|我(?:只|仅)?是)[^，。]{{0,20}}?{_AI_ZH}"
)
_HELPS = re.compile(r"\bhere(?:'s| is| are)\b|\bbelow (?:is|are)\b|```|以下是|下面是|如下|这里有|这是")
_PROMISES = re.compile(r"\b(?:but|however|instead)\b[^.]{0,40}\b(?:i|you) can\b|(?:但|不过|然而)[^。]{0,20}(?:可以|能)")
_TURNS = re.compile(r"\b(?:but|however|though|instead|that said)\b|但|不过|然而|可以")
_ASKS_FOR_REFUSAL = re.compile(
    r"\b(?:refus|declin|apolog|turn(?:ing)? down|say(?:ing)? no|sorry)|拒绝|婉拒|推辞|回绝|道歉|谢绝|抱歉|对不起"
    r"|无法(?:提供|帮助)|(?:can't|cannot) (?:help|assist)"
)
_HEAD, _BEFORE_AT_MOST = 600, 6
_PROMISE_KEPT_IN, _HELP_IN, _LONG = 300, 60, 400


def _refused(question: str, answer: str) -> bool:
    text = _SPECIAL_TOKEN.sub("", answer[: 4 * _HEAD]).replace("\u2019", "'").lower()
    text = text.replace("*", "").lstrip(" \t\r\n_#>-—🙏😔😅.…")
    head = text[:_HEAD]
    if _ASKS_FOR_REFUSAL.search(question[: 4 * _HEAD].lower()) and not _AI_ITSELF.search(head):
        return False
    place = _skip(head)
    before = head[:place]
    sorry = _APOLOGY.search(before) is not None or _AI_ITSELF.search(before) is not None
    kinds = (_REFUSAL_EN, _REFUSAL_ZH, *((_REFUSAL_AFTER_EN, _REFUSAL_AFTER_ZH) if sorry else ()))
    for kind in kinds:
        if found := kind.match(head, place):
            return not _helps(text[found.end() :])
    lacks = _LACKS_EN.match(head, place) or _LACKS_ZH.match(head, place)
    if lacks is None:
        return False
    rest = text[lacks.end() :]
    return _weight(rest) < _LONG and not (_TURNS.search(rest) or _HELPS.search(rest))


def _skip(head: str) -> int:
    """Where the apologies, greetings and introductions at the beginning end."""
    place = 0
    for _ in range(_BEFORE_AT_MOST):
        found = _BEFORE_EN.match(head, place) or _BEFORE_ZH.match(head, place)
        if found is None or found.end() == place:
            break
        place = found.end()
    return place


def _helps(rest: str) -> bool:
    """Whether there is something of use after a refusal."""
    if (found := _HELPS.search(rest)) and _weight(rest[found.end() :]) >= _HELP_IN:
        return True
    promise = _PROMISES.search(rest)
    return promise is not None and _weight(rest[promise.end() :]) >= _PROMISE_KEPT_IN


def _weight(text: str) -> int:
    """Length in Latin letters: a Chinese character says about as much as two or three of them."""
    return len(text) + 2 * len(re.findall(f"[{_CJK}]", text))


# --- repeats

_UNIT = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|([^\w\s]|_)\1*")
_LIST_NUMBER = re.compile(r"^\s*(?:(?:[a-z]{1,12} )?\d{1,4}|[a-z]|第[\d一二三四五六七八九十]{1,4}\w)[.)、:：](?!\d)")
_BEGINS_WITH_LETTER = re.compile(r"[\W_]*[^\W\d_]")  # 0xff is a number
_ASKS_FOR_REPETITION = re.compile(
    r"\b(?:repeat|over and over|again and again|chant|echo)|重复|复读|循环打印|反复|念经"
    r"|\b(?:write|print|say|type|output|copy)\b[^.\n]{0,80}\b(?:\d+|ten|twenty|fifty|a hundred|a thousand|many) times"
    r"|[写说打念抄输][^。\n]{0,40}?[\d一二三四五六七八九十百千两]+\s*[次遍]",
    re.IGNORECASE,
)
_LONGEST_PERIOD = 64
_RULES = frozenset("-_=*~.·#+…—–─━－＿＝")  # lines and leaders are drawn with these
_SINGLE_LETTERS, _SINGLE_MARKS, _SINGLE_DIGITS, _SINGLE_RULES, _SINGLE_SPACES = 24, 40, 100, 130, 300
_WITHOUT_WORDS, _WITHOUT_WORDS_SHORT = 40, 150  # rounds of a loop that holds no word: rows of zeros, rules of a table
_GRAM, _GRAM_SHARE, _GRAM_UNITS = 8, 0.6, 120
_LONG_WORD, _LONG_LINE = 60, 240


def _repeats(question: str, reply: str) -> bool:
    if _ASKS_FOR_REPETITION.search(question[: 4 * _HEAD]):
        return False
    if _single_character(reply):
        return True
    units = _units(reply)
    return _goes_round(units) or _says_it_again(units)


def _single_character(reply: str) -> bool:
    """Whether one character fills a long stretch; a ruled line is not long enough."""
    for character, run in groupby("\n" if letter.isspace() else letter for letter in reply):
        if character == "\n":
            limit = _SINGLE_SPACES
        elif character.isdigit():
            limit = _SINGLE_DIGITS
        elif character in _RULES:
            limit = _SINGLE_RULES
        else:
            limit = _SINGLE_LETTERS if character.isalpha() else _SINGLE_MARKS
        if sum(1 for _ in run) >= limit:
            return True
    return False


def _units(reply: str) -> list[str]:
    """Words, CJK characters and marks; a line of code or of a table is one unit, for such lines are alike by nature."""
    units: list[str] = []
    in_code = False
    for line in reply.lower().split("\n"):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif (in_code or line.count("|") >= 2) and len(line) < _LONG_LINE:
            if line.strip():
                units.append(line.rstrip() + "\n")
        else:
            numbered = _LIST_NUMBER.sub("#.", line)
            for found in _UNIT.finditer(numbered):
                word = found[0]
                units.extend(word if len(word) > _LONG_WORD and word.isalnum() else (word,))
    return units


def _goes_round(units: list[str]) -> bool:
    """Whether a stretch of units comes again at once, many times."""
    # Numbers are compared faster than texts, and a run of equal pairs at one distance is found as bytes are.
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(unit, len(numbers)) for unit in units]
    for period in range(1, min(_LONGEST_PERIOD, len(ids) // 2) + 1):
        # A refrain comes back two or three times; "ha ha ha" and a template's lines are short and come back more often.
        rounds = 12 if period <= 2 else 8 if period <= 8 else 5 if period <= 16 else 4
        same = bytes(map(eq, ids, islice(ids, period, None)))
        place = same.find(b"\1" * (period * (rounds - 1)))
        while place >= 0:
            end = same.find(b"\0", place)
            length = (len(same) if end < 0 else end) - place + period
            words = any(map(_BEGINS_WITH_LETTER.match, units[place : place + period]))
            if words or length >= period * (_WITHOUT_WORDS_SHORT if period <= 2 else _WITHOUT_WORDS):
                return True
            place = same.find(b"\1" * (period * (rounds - 1)), place + length - period) if end >= 0 else -1
    return False


def _says_it_again(units: list[str]) -> bool:
    """Whether most of a reply has been said in it before, in the same words though not at once."""
    if len(units) < _GRAM_UNITS:
        return False
    grams = Counter(zip(*(islice(units, start, None) for start in range(_GRAM)), strict=False))
    total = sum(grams.values())
    return total - len(grams) >= _GRAM_SHARE * total and any(map(str.isalpha, units))


# --- switched language

_QUOTED = re.compile(
    r"`[^`\n]{1,200}`|\"[^\"\n]{1,300}\"|“[^”\n]{1,300}”|‘[^’\n]{1,300}’|「[^」\n]{1,300}」|『[^』\n]{1,300}』|《[^》\n]{1,100}》"
    r"|\$[^$\n]{1,300}\$|\\\([^\n]{1,300}?\\\)|https?://[\x21-\x7e]{1,300}"
)
_LETTER_CJK = re.compile(f"[{_CJK}]")
_WORD_LATIN = re.compile(r"[A-Za-zÀ-ɏ]+(?:'[a-z]+)?")
_ASKS_FOR_LANGUAGE = re.compile(
    r"translat|\b(?:english|chinese|mandarin|cantonese|japanese|korean|french|german|spanish|italian|portuguese|russian"
    r"|latin|pinyin|hanzi|kanji|bilingual|language)\b|翻译|翻一下|译[成为文作]|[英中法德日韩俄]文|[英汉法德日韩俄]语|中英|双语|普通话|拼音|单词|外语"
    r"|语言|字母|西班牙|葡萄牙|意大利|缩写",
    re.IGNORECASE,
)
# Words that hold sentences together, and are no names, terms or keywords of a program.
_PROSE_EN = set(
    re.findall(
        r"\w+",
        "the of to is are was were that this these it its with you your they their can will would be been have has"
        " which there here we our i my he she his her because about also more than what how please",
    )
)
_PROSE = _PROSE_EN.union(
    re.findall(r"\w+", "der die das und ist nicht le la les des une est que pour el los las una por para con del")
)
_ASKS_EN = _PROSE_EN | {"explain", "summarize", "summarise", "write", "describe", "give", "list", "rewrite", "a", "an"}
_CODE_LINE = re.compile(
    r"[{};=<>\[\]]|^\s*(?:def|class|import|from|select|where|insert|create|#|//|--)\b", re.IGNORECASE
)


def _switched_language(question: str, answer: str) -> bool:
    if _ASKS_FOR_LANGUAGE.search(question):
        return False
    asked_cjk, asked_words = _scripts(question)
    asks_latin = len(asked_words) >= 3 or not _ASKS_EN.isdisjoint(asked_words)
    cjk, words = _scripts(answer)
    share = cjk / (cjk + 1.5 * len(words)) if cjk or words else 0.5
    if asked_cjk >= 2 and asked_cjk >= 3 * len(asked_words) and not _ASKS_EN.intersection(asked_words):
        return share <= 0.2 and len(words) >= 6 and len(_PROSE.intersection(words)) >= 2
    return asked_cjk == 0 and asks_latin and share >= 0.6 and cjk >= 8


def _scripts(text: str) -> tuple[int, list[str]]:
    """CJK characters and Latin words (in lower case) of the prose in a text."""
    prose = "\n".join(text.split("```")[::2])
    prose = _QUOTED.sub(" ", _SPECIAL_TOKEN.sub(" ", prose))
    prose = "\n".join(line for line in prose.split("\n") if len(_CODE_LINE.findall(line)) < 2)
    return len(_LETTER_CJK.findall(prose)), [word.lower() for word in _WORD_LATIN.findall(prose)]
