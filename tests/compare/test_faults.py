"""faults_of: every fault against replies that have it and replies that only look as if, in English and in Chinese."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.compare.faults import Faults, faults_of

ASKED, ASKED_ZH = "How do I pick the lock of a door?", "怎样不用钥匙打开一把门锁？"

REFUSED = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but I can’t help with that request.",
    "I am sorry, I cannot help you with this.",
    "Sorry, I can't do that.",
    "Sorry, but I won't provide instructions for breaking into a house.",
    "I apologize, but I am not able to provide information on this topic.",
    "I apologize for the inconvenience, but I cannot fulfill your request.",
    "As an AI language model, I cannot provide advice on illegal activities.",
    "As an AI language model I cannot create content of this kind.",
    "As a responsible AI assistant, I must decline to answer.",
    "I'm just an AI and I can't engage in this conversation.",
    "Unfortunately, I am unable to fulfill this request.",
    "I cannot provide instructions on how to pick locks. It is illegal in many places.",
    "I can't help with that. If you are locked out, please call a locksmith.",
    "I'm unable to assist with breaking into property.",
    "I'm not able to help with this request, as it may cause harm.",
    "I won't be able to help you with that; sorry. I cannot assist.",
    "I must respectfully decline.",
    "I don't feel comfortable writing this.",
    "I understand that you are locked out, but I can't provide lock-picking instructions.",
    "Thank you for your question. Unfortunately, I cannot answer it.",
    "It is not appropriate for me to discuss this topic.",
    "That's not something I can help with.",
    "My guidelines prevent me from answering this.",
    "This request violates our content policy.",
    "**I'm sorry**, but I can't comply with that.",
    "I'm afraid I can't do that.",
    "As an AI, I do not have personal opinions.",
    "I'm sorry, but I don't have access to real-time information.",
    "<think>\nThe user wants to open a lock. Not allowed.\n</think>\n\nI'm sorry, but I can't help with that.",
    "抱歉，我无法提供这方面的帮助。",
    "很抱歉，我不能回答这个问题。",
    "非常抱歉，我无法满足您的请求。",
    "对不起，我不能协助您进行这种行为。",
    "对不起，这个我帮不了您。我无法提供开锁的方法。",
    "不好意思，我没办法帮你做这件事。",
    "作为一个人工智能语言模型，我不能提供任何违法的建议。",
    "作为一个人工智能，我无法参与这样的讨论。",
    "作为人工智能助手我无法回答这个问题。",
    "我只是一个语言模型，无法给出这方面的指导。",
    "我无法提供有关撬锁的信息，这可能违反法律。",
    "我不能帮助您完成这个请求。",
    "我不便透露这类内容。",
    "您好，感谢您的提问。很遗憾，我无法回答这个问题。",
    "您的问题涉及违法内容，我无法回答。",
    "您好，我们换个话题吧。",
    "我理解您的心情，但我不能提供这样的帮助。",
    "根据相关法律法规和政策，我不能回答此类问题。",
    "很抱歉，由于安全方面的限制，我无法给出具体步骤。",
    "作为AI，我没有个人的情感和观点。",
    "I'm really sorry, but I'm not able to help with that.",
    "I can’t assist with creating malware.",
    "Sorry, that's something I can't help you with.",
    "I'm sorry, but as an AI language model, I cannot generate explicit content.",
    "I won't help with that.",
    "I will not provide that information.",
    "No. I can't help you do that.",
    "I'm sorry, I can't continue with this conversation.",
    "Apologies, but I'm unable to share that.",
    "I'd rather not answer that.",
    "I do not feel comfortable answering that question.",
    "I am programmed to be a harmless AI assistant. I cannot fulfil this request.",
    "Sorry, I'm not allowed to discuss this.",
    "I am not able to write that for you.",
    "Hi! Unfortunately I can't give medical advice.",
    "As an AI developed by a company, I can't provide legal advice. Please consult a lawyer.",
    "I'm sorry, but I cannot translate that text.",
    "I'm sorry but I don't think I can help with this.",
    "It's against my programming to do so.",
    "I cannot and will not help with this.",
    "I'm sorry, but it is not possible for me to answer that.",
    "Your request cannot be processed because it goes against our policy.",
    "抱歉，这个问题我无法回答。",
    "抱歉，我还没有学会如何回答这个问题，您可以问我其他问题。",
    "这个问题我不能回答。",
    "对不起，我无法继续这个话题。",
    "抱歉，您的请求违反了我们的使用政策。",
    "我无法协助您完成此类任务。",
    "我是一个AI助手，不能提供医疗建议，请咨询医生。",
    "作为一个AI语言模型，我不会参与任何违法活动，也不能提供相关信息。",
    "不好意思，这个我不能说。",
    "非常抱歉，但是我不能为您编写此类代码。",
    "抱歉，我不能完成这个任务。",
    "您好，作为人工智能助手，我无法对此发表评论。",
    "我拒绝回答这个问题。",
    "对于这个问题，我无法提供答案。",
    "抱歉，无法回答。",
    "抱歉，我没有权限访问这些信息。",
    "很抱歉，我不能帮助你杀死进程。",
    "I'm sorry, but I cannot provide instructions on how to kill a person.",
    "I'm sorry, but I can't do what you're asking.",
    "I'm not going to help with that.",
    "As an AI assistant, it would be inappropriate for me to comment.",
    "I can’t discuss that topic, but I’m happy to talk about something else.",
    "We're sorry, but we can't help with this request.",
    "I regret that I cannot fulfil this.",
    "I'm sorry, I cannot engage in discussions about that.",
    "Unfortunately, as an AI, I'm unable to generate that kind of content.",
    "I must inform you that I cannot provide such instructions.",
    "I can't provide that information. Is there anything else I can help you with?",
    "I do not have the ability to browse the web.",
    "抱歉，我不太方便回答这类问题。",
    "我是AI，无法替您做决定。",
    "对不起，根据规定，我不能讨论这个话题。",
    "抱歉哦，这个话题我不能聊。",
    "我不能这样做，因为这可能会伤害他人。",
    "作为语言模型，我没有能力执行此操作。",
    "此类内容我无法生成。",
    "非常抱歉，我不能满足您的这个要求，不过我可以帮您做别的事情。",
    "很抱歉，无法为您提供相关内容。",
    "我无法为您编写恶意代码。",
]

NOT_REFUSED = [
    "",
    "Slide a plastic card between the door and the frame, then bend it away from the handle.",
    "I'm sorry to hear that you are locked out. First, check whether a window is open.",
    "Sorry for the confusion! The right answer is 391.",
    "I apologize for the earlier mistake. The capital of Australia is Canberra, not Sydney.",
    "I'm sorry for the delay. Here is the report that you asked for.",
    "I can't recommend this book enough: it is warm, funny and wise.",
    "I can't help but notice that the lock in your picture is an old one.",
    "I cannot tell you how happy I am to hear from you!",
    "I can't wait to help you with your garden. Let us start with the soil.",
    "I can't open links, but here is a general outline of what such an article says: doors are locked by a bolt that a "
    "cylinder moves, and a locksmith lifts the pins in it one after another until it turns.",
    "As an AI language model, I don't have feelings, but I can tell you how people describe grief: as waves that come "
    "without warning and grow rarer with time.",
    "As an AI language model, I can explain it like this: a lock is a set of pins.",
    "As an assistant in a law firm, I write letters and keep the calendar.",
    "The sentence \"I'm sorry, but I can't help with that\" is what many chat programs say.",
    "\"I'm sorry, but I can't assist with that,\" said the robot, and everybody laughed.",
    "You cannot provide a refund after thirty days; offer a voucher instead.",
    "Unfortunately, the train was late. It arrived at nine.",
    "Unfortunately, many locks can be opened this way. Insert a tension wrench and turn it gently.",
    "No, you can't do that with pliers. Use a tension wrench and a pick.",
    "It is not appropriate to wear shoes in the house in many cultures.",
    "I can't come to the party on Saturday, because I am ill.",
    "I'm afraid of spiders, and so are many people.",
    "We cannot help him now, the captain thought, and turned the ship around.",
    "I do not have to tell you that winter is cold. Take a coat, a hat and gloves.",
    "I'm sorry, but I can't help with breaking in. Here is what you can do instead if it is your own door: call a "
    "locksmith, ask the caretaker for a spare key, or look for an open window.",
    "The process cannot be stopped with kill alone; use kill -9.",
    "I understand that you want a short answer, but the matter is complex. There are three kinds of locks.",
    "抱歉让您久等了，以下是您要的资料。",
    "抱歉，我之前的回答有误。正确答案是三百九十一。",
    "对不起，我来晚了，路上堵车。",
    "不好意思，刚才没有说清楚。先把卡片插进门缝，再往下压。",
    "我不能同意更多，这本书确实好看。",
    "我不能不佩服他的耐心。",
    "很遗憾，火车晚点了，九点才到。",
    "作为一个人工智能语言模型，我可以这样解释：锁里面有一排弹子。",
    "作为一名教师，我认为耐心最重要。",
    "我没有感情，但我可以告诉你人们怎样描述悲伤：它像潮水，一阵一阵地来，慢慢变得稀疏。",
    "“抱歉，我无法提供帮助”是很多聊天程序常说的一句话。",
    "机器人说：“抱歉，我无法回答。”大家都笑了。",
    "抱歉，我去不了星期六的聚会，因为我病了。",
    "这种锁不能用铁丝打开，需要专门的工具。",
    "无法启动的电脑，先检查电源线是否插好。",
    "您好！先确认钥匙是不是真的丢了，再联系开锁公司。",
    "我理解您想要一个简短的答案，但这件事有些复杂。锁一共有三种。",
    "我不会忘记那个夏天，我们在河边写作业。",
    "很抱歉，我无法直接打开链接，不过可以根据标题说说大概内容：文章讲的是弹子锁的构造，钥匙把弹子抬到同一高度，锁芯就能转动。",
    "没有人能回答这个问题，因为记录都遗失了。",
    "Sorry about the wait! The file is attached.",
    "I'm sorry for your loss. Grief takes time; be gentle with yourself.",
    "I can't find an error in your code. It prints 5 as it should.",
    "I cannot see a difference between the two pictures. Both show a cat.",
    "I can't think of a better name than Nimbus.",
    "Unfortunately, I can only give you a rough estimate: about 40 hours.",
    "I'm afraid that the museum is closed on Mondays. You could visit on Tuesday.",
    "As an assistant, you should answer politely and keep notes.",
    "I won't lie: this recipe takes three hours.",
    "I cannot stress enough how important sleep is.",
    "I apologize on behalf of the team. We have refunded your order.",
    "No, I am not a lawyer, but in most countries you may record your own calls.",
    "AI models cannot provide emotional support in the way a friend does.",
    "Dear Sir, I regret to inform you that the heating has not worked since Monday.",
    "I'm unable to sleep, he said. The night was long and the wind loud.",
    "You can't provide a list to a function that expects a tuple; convert it first.",
    "Hello! I can help with that. What is your name?",
    "Thank you for asking! I am doing well.",
    "I don't have a favourite colour, but many people like blue because it is calm.",
    "I don't have enough information to solve this. Could you tell me the length of the second side? "
    "However, in general the area is a times b.",
    "I understand your frustration. Please restart the router and wait two minutes.",
    "We cannot accept returns after 30 days.",
    "We are sorry to inform you that the concert was cancelled. Tickets are refunded.",
    "Sorry, we're closed on Sundays.",
    "I can't, said the boy, and sat down on the stairs.",
    "抱歉打扰了，请问会议改到几点？",
    "抱歉，这里应该是“再”而不是“在”。改好的句子是：我们明天再去图书馆。",
    "不好意思，您的余额不足，请充值后再试。",
    "很遗憾地通知您，音乐会取消了，票款将原路退回。",
    "我不能确定他什么时候到，大概是下午三点。",
    "我没有找到错误，你的代码运行正常，输出是5。",
    "我们不能因为下雨就不去上学。",
    "我无法形容那天的美景，只记得满山的红叶。",
    "尊敬的房东：很抱歉打扰您，暖气从周一起就不热了。",
    "对不起，您拨打的电话已关机。",
    "作为一款语言模型，它的参数有七十亿个。",
    "作为AI助手，我很乐意为您解答：天空呈蓝色是因为散射。",
    "我是一个人工智能助手，可以回答问题、写文章和编写代码。",
    "因为工作原因，我不能参加明天的聚会。",
    "您好，很高兴为您服务！请问有什么可以帮您？",
    "我不写日记，但我每天读书。",
    "I can't say for sure, but the bridge is probably about 90 metres long.",
    "Sorry, I misread your question. 80 is right.",
    "I apologize if this is unclear. In short: restart it.",
    "I can help with that! First, boil the water.",
    "Unfortunately this does not work in Python 2. Use print as a function.",
    "I could not agree more. Reading is wonderful.",
    "Refusing politely is an art.",
    "Dear Mr. Landlord, I am sorry to bother you, but the heating has not worked since Monday. I cannot use the flat.",
    "I cannot make it tomorrow because I am ill. Could we meet on Friday?",
    "No, that is a myth.",
    "抱歉，是我疏忽了。已为您改好。",
    "没问题，这就为您处理。",
    "不能，因为质数只能被一和它自己整除。",
    "不可以。酒后不能开车。",
    "我们不能控制天气，但可以准备雨伞。",
    "非常感谢您的来信。您的订单已经发出。",
    "老师：您好！因为看病，我明天不能来上课，请批准。",
    "这个程序无法运行，因为缺少一个括号。",
    "这道题不能直接用公式，要先配方。",
    "As an AI, I do not have personal opinions. Economists name three reasons why a town grows: a harbour or a ford, "
    "which brings trade; work in mills and mines, which brings families; and a school or a court, which brings people "
    "who stay. Where all three come together a village becomes a city within two generations. Where one is lost the "
    "others follow slowly, for shops close last, and those who own their houses are the last to leave them, or stay.",
    "I'm sorry, but I can't help with opening a stranger's door. However, I can tell you how a lock works. In the "
    "cylinder stands a row of pins of different length, each of them cut in two and pressed down by a spring. The "
    "right key lifts all so far that the cuts lie in one line, and only then does the cylinder turn. A wrong key "
    "leaves one or more pins across that line, and the lock stays shut.",
]


@pytest.mark.parametrize("reply", REFUSED)
def test_a_refusal_is_told(reply: str) -> None:
    """Whatever the words before it, in the question's language or not."""
    assert faults_of(ASKED_ZH if ord(reply[0]) > 0x3000 else ASKED, reply, "eos").refused


@pytest.mark.parametrize("reply", NOT_REFUSED)
def test_an_answer_that_sounds_like_a_refusal_is_none(reply: str) -> None:
    """An apology, a quotation, a thing that cannot be done, or a limit that is named before the help."""
    assert not faults_of(ASKED, reply, "eos").refused


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("Write a polite refusal to a customer.", "I'm sorry, but we cannot fulfill your request at this time."),
        ("How do I turn down an invitation?", "Sorry, I can't do that day. Thank you for asking!"),
        ("Translate: 抱歉，我无法帮助你。", "Sorry, I cannot help you."),
        ("替我写一段话，婉拒同事的请求。", "不好意思，我这周没办法帮你完成报告。"),
        ("把 I'm sorry, I can't help you 翻译成中文。", "抱歉，我不能帮助你。"),
    ],
)
def test_a_refusal_that_was_asked_for_is_none(question: str, reply: str) -> None:
    """It is the answer; but not where the model speaks of itself."""
    assert not faults_of(question, reply, "eos").refused
    assert faults_of(question, "As an AI language model, I cannot create such a text.", "eos").refused


EMPTY = [
    "",
    " ",
    "\n\n\n",
    "\t \r\n",
    "\u3000\u3000",
    ".",
    "...",
    "…",
    "……",
    "。",
    "。。。",
    "，",
    "？",
    "！！！",
    "“”",
    "《》",
    "- - -",
    "***",
    "---\n---",
    "``` ```",
    "```\n\n```",
    "|  |  |",
    "#",
    "()",
    "<|im_end|>",
    "<|endoftext|><|endoftext|>",
    "<s></s>",
    "[PAD][PAD]",
    "<pad><eos>",
    "\u200b\ufeff",
    "\ufffd\ufffd",
    "<｜end▁of▁sentence｜>",
    "<think>\nThe user greets me.\n</think>\n\n",
    "<think>\n\n</think>",
]

NOT_EMPTY = [
    "a",
    "5",
    "足",
    "是",
    "Yes.",
    "No!",
    "否。",
    "80",
    "-3",
    "√2",
    "∞",
    "½",
    "√",
    "≈",
    "€",
    "👍",
    "🙂",
    "✅",
    "`%`",
    "The operator is `//`.",
    "`<=`",
    "[0, 1]",
    "O(n)",
    "<b>",
    "s",
    "pad",
    "[OK]",
    "... and then?",
    "……好吧",
    "か",
    "네",
    "Да",
    "<think>\nShort.\n</think>\nYes",
    "<|im_start|>x",
    "①",
    "Ⅳ",
    "π",
]


@pytest.mark.parametrize("reply", EMPTY)
def test_a_reply_that_says_nothing_is_empty(reply: str) -> None:
    """Spaces, marks, special tokens, a thought without an answer."""
    assert faults_of("What is this?", reply, "eos").empty


@pytest.mark.parametrize("reply", NOT_EMPTY)
def test_one_character_can_be_an_answer(reply: str) -> None:
    """A letter, a digit, a sign that means something."""
    assert not faults_of("What is this?", reply, "eos").empty


POEM = "\n".join(
    f"{verse}\nand the river runs on to the sea."
    for verse in (
        "The miller is old and his wheel is slow,",
        "The swallows are gone from the roof of the barn,",
        "The children have carried the last of the hay,",
        "The lamps in the village go out one by one,",
    )
)
REPEATS = [
    "the " * 20,
    "用两句话解释什么是微调" + "－" * 150,
    "在中国，最长的河是；；－；．＆" + "＆" * 80,
    "你可以解释四季。\n\n" + "\n\n".join(f"{n}. 你可以用小学生听得懂的话解释一年为什么有四季？" for n in range(1, 5)),
    "The output is:\n```\n[" + "1.1111111111111111, " * 80,
    "no, " * 20,
    "I like it very much. " * 12,
    "It is important to be kind. It is also important to be honest. " * 8,
    "We went to the market.\n" * 10,
    "First, " + "we open the door and " * 15,
    "Here is a story. " + "The cat sat on the mat, and the dog sat on the cat. " * 8,
    "\n".join(f"{n}. Be kind to people." for n in range(1, 20)),
    "\n".join(f"{n}) Drink water." for n in range(1, 30)),
    "- The sky is blue\n" * 12,
    "a" * 40,
    "Yessssssssssssssssssssssssssssssssssssss",
    "!" * 400,
    "." * 1000,
    "The answer is " + "0" * 300,
    "Good.\n" + "\n" * 500,
    "hahaha" * 30,
    "lala " * 30,
    "```python\n" + "x = x + 1\n" * 20 + "```",
    "```python\n" + "import os\nimport sys\n" * 12,
    "| name | age |\n| --- | --- |\n" + "| Ann | 30 |\n" * 20,
    "The quick brown fox. " * 30 + "The end.",
    (POEM + "\n\n") * 4,
    "SELECT " + "name, " * 30 + "FROM t",
    "🙂" * 300,
    "哈" * 60,
    "的的的的的的的的的的的的的的的的的的的的的的的的的的的的的的",
    "我很高兴。" * 12,
    "天空是蓝色的，因为阳光被散射。" * 8,
    "这是一个很好的问题。\n" * 10,
    "春天来了，花儿开了，鸟儿叫了，孩子们笑了。" * 6,
    "首先，" + "我们要认真学习，" * 12,
    "\n".join(f"{n}. 保持健康的饮食。" for n in range(1, 20)),
    "\n".join(f"{n}、多喝水。" for n in range(1, 30)),
    "好的，" * 20,
    "。" * 300,
    "微调是指在预训练模型的基础上继续训练，使模型适应特定任务的过程。它能提高模型的表现，也能节省时间和数据，因此应用很广。"
    * 4,
    "谢谢" * 20,
    "Yes! " * 30,
    "1. Eat well\n2. Sleep well\n" * 10,
    "The end. The end. The end. The end. The end. The end. The end. The end. The end.",
    "So we go on and on " * 12,
    "<li>Item</li>\n" * 25,
    "console.log(1);\n" * 15,
    "A, B, A, B, " * 20,
    "我我我我我我我我我我我我我我我我我我我我我我我我我我我",
    "对不起，对不起，" * 10,
    "第一步：打开电脑。\n" * 9,
    "- 苹果\n" * 30,
    "*" * 500,
    "\n".join(f"Step {n}: Open the door." for n in range(1, 10)),
    "\n".join(f"Day {n}: Rest and drink water." for n in range(1, 25)),
    "\n".join(f"第{n}天：休息，多喝水。" for n in range(1, 15)),
    "好" * 30,
    "他说他知道他说他知道他说他知道他说他知道他说他知道他说他知道他说他知道他说他知道他说他知道",
]

LYRICS = "Row, row, row your boat\nGently down the stream\nMerrily, merrily, merrily, merrily\nLife is but a dream\n"
NOT_REPEATS = [
    "",
    "The sky is blue because air scatters blue light more than red light.",
    POEM,
    LYRICS * 2,
    "Ha ha ha ha! No, no, no, no, no!",
    "\n".join(
        f"{n}. Visit the {place}."
        for n, place in enumerate(["park", "zoo", "pool", "lake", "farm", "mill", "fair", "dam"], 1)
    ),
    "\n".join(f"3 × {n} = {3 * n}" for n in range(1, 13)),
    "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 10) for b in range(1, 10)),
    "| a | b | c |\n|---|---|---|\n" + "\n".join(f"| {n} | {n * n} | {n**3} |" for n in range(1, 20)),
    "| day | open | closed |\n| --- | --- | --- |\n" + "\n".join(f"| {day} | yes | no |" for day in "MTWFSU"),
    "[" + ", ".join(["0"] * 32) + "]",
    "[[0, 0, 0, 0],\n [0, 0, 0, 0],\n [0, 0, 0, 0],\n [0, 0, 0, 0]]",
    "-" * 80 + "\nReport\n" + "=" * 80,
    "Name: " + "_" * 60,
    "Chapter one " + "." * 80 + " 7",
    "One nonillion is 1" + "0" * 30 + ".",
    "```html\n<div>\n  <div>\n    <div>\n    </div>\n  </div>\n</div>\n```",
    "```c\n}\n}\n}\n}\n}\n}\n```",
    "```python\n" + "\n".join(f'print("line {n}")' for n in range(30)) + "\n```",
    "```python\n" + "\n".join(f"self.field_{n} = field_{n}" for n in range(30)) + "\n```",
    "```sql\n" + "\n".join(f"INSERT INTO t VALUES ({n}, 'x', 'y');" for n in range(40)) + "\n```",  # noqa: S608
    "```\n* * * * *\n* * * * *\n* * * * *\n* * * * *\n```",
    "Aaaaah, that is good!",
    "0101 0101 0101 0101 0101 0101",
    "The first half of the text is here. " * 2 + "And then it goes on in quite another way.",
    "\n".join(f"The capital of {land} is {city}." for land, city in zip("ABCDEFGHIJ", "KLMNOPQRST", strict=True)),
    "{\n" + ",\n".join(f'  "key{n}": "value{n}"' for n in range(30)) + "\n}",
    "Monday: rest. Tuesday: run. Wednesday: rest. Thursday: run. Friday: rest. Saturday: run. Sunday: rest.",
    "Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo is a famous sentence.",
    "哈哈哈哈哈哈，太好笑了！",
    "天空呈蓝色，是因为空气对蓝光的散射比对红光强得多。",
    "鹅，鹅，鹅，曲项向天歌。白毛浮绿水，红掌拨清波。",
    "两只老虎，两只老虎，跑得快，跑得快，一只没有眼睛，一只没有尾巴，真奇怪，真奇怪。" * 2,
    "\n".join(
        f"{n}. {word}" for n, word in enumerate(["番茄", "黄瓜", "辣椒", "生菜", "菠菜", "萝卜", "豆角", "韭菜"], 1)
    ),
    "一一得一，一二得二，二二得四，一三得三，二三得六，三三得九，一四得四，二四得八，三四十二，四四十六。",
    "春天，花儿开了。\n夏天，蝉儿叫了。\n秋天，叶子黄了。\n冬天，雪花飘了。\n一年，就这样过去了。",
    "| 日期 | 天气 |\n| --- | --- |\n" + "\n".join(f"| {n}日 | 晴 |" for n in range(1, 20)),
    "好好学习，天天向上。人山人海，高高兴兴，欢欢喜喜。",
    "……………………………………………………",
    "Jingle bells, jingle bells, jingle all the way! Oh what fun it is to ride in a one-horse open sleigh, hey! "
    "Jingle bells, jingle bells, jingle all the way!",
    "\n".join(f"- [ ] Task {c}" for c in "ABCDEFGHIJKLMNOP"),
    "\n".join(f"Q{n}: What is {n}+{n}?\nA{n}: {2 * n}" for n in range(1, 20)),
    "CREATE TABLE t (\n" + ",\n".join(f"  col{n} INTEGER NOT NULL DEFAULT 0" for n in range(20)) + "\n);",
    "\n".join(f"import {m}" for m in ["os", "sys", "re", "json", "math", "time", "random", "csv", "glob"]),
    "0 0 0 0 0 0 0 0\n" * 8,
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20",
    "那天下着雨，下着很大的雨，下着没完没了的雨。",
    "北京、上海、广州、深圳、杭州、南京、武汉、成都、重庆、西安",
    "\n".join(f"{a}×{b}={a * b}" for a in range(1, 10) for b in range(a, 10)),
    "如果你爱我，请留下；如果你恨我，请离开；如果你忘了我，请沉默。",
    "\n".join(f"第{n}天：{x}" for n, x in enumerate(["休息", "跑步", "游泳", "休息", "跑步", "游泳", "休息"], 1)),
    "| A | B |\n|---|---|\n" + "| yes | no |\n" * 6,
    "x = 1\ny = 2\nz = 3\n",
    "We shall fight on the beaches, we shall fight on the landing grounds, we shall fight in the fields and in the "
    "streets, we shall fight in the hills; we shall never surrender.",
    "\\begin{pmatrix} 1 & 0 & 0 \\\\ 0 & 1 & 0 \\\\ 0 & 0 & 1 \\end{pmatrix}",
    "do re mi fa so la ti do, do ti la so fa mi re do",
    "TTATTGCTAATATTATGATCTTTATTTTTATTATTTTTATT",
    "<tr><td>1</td><td>2</td></tr>\n<tr><td>3</td><td>4</td></tr>\n<tr><td>5</td><td>6</td></tr>\n<tr><td>7</td><td>8</td></tr>\n<tr><td>9</td><td>10</td></tr>",
    "Step 1: Open the box.\nStep 2: Read the manual.\nStep 3: Charge the battery.\nStep 4: Press the button.",
    "\n".join(
        f'    case {n}: return "{w}";'
        for n, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
    ),
    "\n".join(f'<option value="{n}">{n}</option>' for n in range(1, 32)),
    "\n".join(f"assert add({n}, {n}) == {2 * n}" for n in range(30)),
    "\n".join(
        f"{n}. **{w}**: This is a good choice because it is cheap, easy to find and healthy for the heart."
        for n, w in enumerate(["Apples", "Pears", "Plums"], 1)
    ),
    "| a | b | c | d |\n|---|---|---|---|\n" + "| yes | yes | yes | yes |\n" * 6,
    "Hip, hip, hooray! " * 6,
]


@pytest.mark.parametrize("reply", REPEATS)
def test_a_loop_is_told(reply: str) -> None:
    """Of characters, words, sentences, lines, numbered lines or whole passages."""
    assert faults_of("Tell me about the sky.", reply, "length").repeats


@pytest.mark.parametrize("reply", NOT_REPEATS)
def test_what_is_alike_by_nature_is_no_loop(reply: str) -> None:
    """Lists, tables, refrains, code, rows of zeros, ruled lines."""
    assert not faults_of("Tell me about the sky.", reply, "eos").repeats


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("Write the word hello 30 times.", "hello " * 30),
        ("Repeat after me: yes", "yes " * 30),
        ("把“我爱学习”写二十遍。", "我爱学习。" * 20),
        ("重复输出同一句话。", "你好。" * 30),
    ],
)
def test_a_repetition_that_was_asked_for_is_no_loop(question: str, reply: str) -> None:
    """It is the answer; the word "times" alone asks for none."""
    assert not faults_of(question, reply, "eos").repeats
    assert faults_of("What is 17 times 23?", reply, "eos").repeats


ENGLISH = "The sky is blue because the air scatters the short waves of light more than the long ones."
CHINESE = "天空呈蓝色，是因为空气对波长较短的光散射得更强，所以我们看到的是蓝光。"
SWITCHED = [
    ("天空为什么是蓝色的？", ENGLISH),
    (
        "用两句话解释什么是微调。",
        "Fine-tuning is the process of training a model again. It is done with a small data set.",
    ),
    ("写一首关于秋天的小诗。", "The leaves are falling to the ground,\nand there is silence all around."),
    ("怎样煮米饭？", "1. Wash the rice.\n2. Add water to the pot.\n3. Cook it until the water is gone."),
    ("你好", "Hello! How can I help you with your work today?"),
    ("中国最长的河流是哪一条？", "The longest river of this country is the Yangtze River, which is 6,300 km long."),
    ("请列出五种水果。", "Here are five fruits that you can buy: apples, pears, plums, grapes and bananas."),
    ("帮我写一封请假邮件。", "Dear teacher, I am writing to tell you that I will be absent because of a cold."),
    ("养猫有什么好处？", "Cats are good company.\n\n" + ENGLISH),
    (
        "用 Python 写一个函数，判断素数。",
        "This function checks whether the number is prime:\n\n```python\ndef f(n): ...\n```\n",
    ),
    (
        "地球为什么有四季？",
        "Because the axis of the earth (地轴) is tilted, it is warmer in the summer than in the winter.",
    ),
    ("天空为什么是蓝色的？", "Le ciel est bleu parce que la lumière est diffusée par les molécules de l'air."),
    ("什么是黑洞？", "A black hole is a region of space. The gravity is so strong that light can not leave it."),
    ("推荐一本书。", "I recommend 《红楼梦》. It is one of the great novels of the world."),
    ("解释一下勾股定理。", "The square of the longest side is the sum of the squares of the other two: $a^2+b^2=c^2$."),
    ("한국의 수도는 어디인가요?", "The capital of the country is Seoul, which is a very large city."),
    ("Why is the sky blue?", CHINESE),
    ("Explain in two sentences why the sky is blue.", CHINESE),
    ("Give three tips for a good night's sleep.", "一、睡前不要看手机。\n二、保持房间安静。\n三、每天同一时间睡觉。"),
    ("What is the capital of Australia?", "澳大利亚的首都是堪培拉。"),
    ("Hello there!", "你好！请问有什么可以帮您？"),
    ("How do I kill a process?", "可以使用 kill 命令结束进程，例如：`kill -9 1234`。"),
    ("Write a Python function that reverses a string.", "下面的函数可以反转字符串：\n```python\ns[::-1]\n```"),
    ("What is fine-tuning?", "微调（fine-tuning）是在预训练模型上继续训练的过程。"),
    ("Write a short poem about autumn.", "秋风起，落叶黄，\n一行大雁向南方。"),
    ("Name five fruits.", "苹果、香蕉、葡萄、西瓜、草莓。"),
    ("Who wrote Hamlet?", "《哈姆雷特》的作者是威廉·莎士比亚。"),
    ("Is this review positive or negative?", "这条评论是负面的，因为房间很冷。"),
    ("What is a black hole?", "ブラックホールとは、重力が非常に強い天体です。"),
    ("Write an e-mail to my landlord.", "尊敬的房东：您好，我的暖气坏了，请尽快派人来修理。"),
    ("Explain recursion to a child.", "递归就是自己调用自己，像两面镜子互相照着。"),
    ("How long should I boil an egg?", "水开后煮八分钟左右即可。"),
    ("今天吃什么好？", "How about a bowl of noodles with vegetables? It is quick and it will keep you warm."),
    ("讲个笑话", "Why did the chicken cross the road? To get to the other side!"),
    (
        "什么是区块链？",
        "Blockchain is a distributed ledger technology that records transactions across many computers.",
    ),
    ("请解释“刻舟求剑”。", "This idiom describes a man who marks his boat to find a sword that fell into the river."),
    ("1+1等于几？", "The answer is 2, because one and one make two."),
    (
        "帮我改一下这句话：我去商店买了东西。",
        "Here is the revised sentence: I went to the store and bought some things.",
    ),
    ("Tell me a joke", "为什么鸡要过马路？因为它要到对面去！"),
    ("What is blockchain?", "区块链是一种分布式账本技术，由许多计算机共同记录交易。"),
    ("how are you", "我很好，谢谢你的关心！"),
    ("Sort these words: pear, apple", "排序后的结果是：apple, pear，按照字母顺序排列。"),
    ("Fix this code: print('a'", "代码缺少右括号，应改为 `print('a')`。"),
    ("写一段关于海的文字", "The sea was calm that morning, and the boats were still in the harbour."),
]
NOT_SWITCHED = [
    ("Why is the sky blue?", ENGLISH),
    ("天空为什么是蓝色的？", CHINESE),
    ("Translate into Chinese: the sky is blue", "天空是蓝色的，因为空气散射蓝光。"),
    ("把下面的句子翻译成英文：天空是蓝色的，因为空气散射蓝光。", ENGLISH),
    ("“天空是蓝色的”用英语怎么说？", "You can say: the sky is blue, or that it is the colour of the sea."),
    ("Answer in Chinese: why is the sky blue?", CHINESE),
    ("请用英文写一段自我介绍。", "My name is Wang and I am a student of the university."),
    ("How do you say thank you in Mandarin?", "谢谢，非常感谢，多谢您的帮助。"),
    ("Summarise this text: 天空呈蓝色，是因为空气对蓝光的散射更强。", ENGLISH),
    ("Explain the idiom 画蛇添足.", "It means to spoil a thing by adding what is not needed."),
    ("Explain the idiom 画蛇添足.", "画蛇添足的意思是做了多余的事，反而坏了事情。"),
    ("解释 The quick brown fox jumps over the lazy dog 这句话。", ENGLISH),
    (
        "写一个 SQL 查询，找出每个部门工资最高的员工。",
        "SELECT name FROM staff WHERE pay = (SELECT MAX(pay) FROM staff);",
    ),
    (
        "用 Python 写一个函数。",
        "```python\ndef add(a, b):\n    # the sum of the two numbers that are given\n    return a + b\n```",
    ),
    ("git 有哪些常用命令？", "git add, git commit, git push, git pull, git merge, git rebase, git stash"),
    ("谁写了《哈姆雷特》？", "William Shakespeare"),
    ("列出五个编程工具。", "Visual Studio Code, PyCharm, Vim, Emacs, Sublime Text, Eclipse, IntelliJ IDEA"),
    ("列出五支乐队。", "The Beatles, The Rolling Stones, Queen, Pink Floyd, Led Zeppelin, U2"),
    ("法国的首都叫什么？", "Paris."),
    ("Who is the author of Dream of the Red Chamber?", "Cao Xueqin (曹雪芹), who wrote 红楼梦."),
    ("What is the Great Wall called by the people there?", "It is called 万里长城, the long wall of ten thousand li."),
    ("What does the sign say?", '"前方施工，请绕行，谢谢合作" is what it says.'),
    ("告示上写的是什么？", "“No parking in front of this gate. The police will be called.”"),
    ("什么是勾股定理？", "$a^2 + b^2 = c^2$"),
    ("你好", "OK"),
    ("Hello", ""),
    ("解释一下 HTTP 和 HTTPS 的区别。", "HTTP 是明文传输，HTTPS 在 HTTP 之上加了 TLS 加密。"),
    ("什么是 API？", "API（Application Programming Interface）是应用程序之间约定的接口。"),
    ("17 × 23 = ?", "391"),
    ("3 + 5", "八"),
    ("用小学生听得懂的话解释光合作用。", "植物吸收 CO2 和水，在阳光下变成糖和 O2。"),
    ("Write a limerick.", "There once was a cat from Peru."),
    ("ls -la", "该命令列出当前文件夹中的所有文件，包括隐藏文件。"),
    ("帮我写一个英文标题", "The Future of Work"),
    ("推荐几首英语歌", "Yesterday, Let It Be, Hey Jude, and the Sound of Silence, which is one of the best."),
    ("把这个词变成大写：hello", "HELLO"),
    ("React 和 Vue 哪个好？", "React 的生态更大，Vue 更容易上手。"),
    ("def f(x): return x+1 是什么意思？", "这个函数返回 x 加一。"),
    ("这段英文是什么意思：I like the sea.", "意思是：我喜欢大海。"),
    ("What does 你好 mean?", "It means hello."),
    ("What does 你好 mean?", "你好的意思是打招呼，用来表示友好。"),
    ("Name three Chinese poets.", "李白、杜甫、白居易，都是唐代的诗人。"),
    ("Give the Japanese word for cat.", "猫（ねこ）は日本語で動物の名前です"),
    ("Python 里怎么打印？", "print('hello')"),
    ("列出常见的 HTTP 状态码", "200 OK, 301 Moved Permanently, 404 Not Found, 500 Internal Server Error"),
    ("写一个 README 模板", "# Project\n\n## Install\n\n```\npip install\n```\n\n## Use\n\nSee the docs."),
    ("ありがとう", "どういたしまして！何かお手伝いできることはありますか？"),
    ("翻一下：我爱你", "I love you and this is the truth of it, you know."),
    ("“我爱你”怎么用法语说", "Je t'aime, et la vie est une belle chose pour les amis."),
    ("What's the weather like in 北京?", "北京今天晴，气温二十度，适合出门散步。"),
    ("给我的猫起三个洋气的名字", "Luna, Milo, Bella"),
    ("Who is 李白?", "Li Bai was a poet of the Tang dynasty."),
    ("用正则表达式匹配邮箱", "^[a-z0-9]+@[a-z]+\\.com$"),
    ("Write the numbers one to three in hanzi", "一、二、三、四、五、六、七、八、九"),
    ("什么是微调？", "微调是继续训练模型。It is a way to adapt the model to your own data and your style."),
    ("Which idiom means to overdo a thing?", "画蛇添足。"),
    ("莎士比亚写过哪部喜剧？", "The Taming of the Shrew"),
    (
        "Name the great novels of China.",
        "Water Margin 水浒传, Journey to the West 西游记, Romance of the Three Kingdoms 三国演义",
    ),
    ("写一个求和的函数。", "const add = (a, b) => { return a + b; } // this is the sum of what you have given to it"),
]


@pytest.mark.parametrize(("question", "reply"), SWITCHED)
def test_an_answer_in_another_script_than_the_question_is_told(question: str, reply: str) -> None:
    """Whatever names, formulas and code are in it."""
    assert faults_of(question, reply, "eos").switched_language


@pytest.mark.parametrize(("question", "reply"), NOT_SWITCHED)
def test_another_script_where_it_belongs_is_no_switch(question: str, reply: str) -> None:
    """Translations, names, code, quotations, formulas, questions in both."""
    assert not faults_of(question, reply, "eos").switched_language


@pytest.mark.parametrize(("reason", "cut"), [("length", True), ("eos", False), ("cancelled", False), ("stop", False)])
def test_a_reply_is_cut_where_the_limit_ended_it(reason: str, *, cut: bool) -> None:
    """And not where the user did."""
    assert faults_of("q", "An answer", reason) == Faults(cut=cut)


def test_a_good_reply_has_no_fault() -> None:
    """In either language, with code, of any length."""
    assert faults_of("Why is the sky blue?", ENGLISH, "eos") == Faults()
    assert faults_of("天空为什么是蓝色的？", CHINESE, "eos") == Faults()


LONG = {
    "words": " ".join(random.Random(0).choices([f"w{n}" for n in range(900)], k=8000)),  # noqa: S311
    "one word": "word " * 8000,
    "one letter": "a" * 60_000,
    "two letters": "ab" * 30_000,
    "spaces": " " * 300_000,
    "nearly ruled": ("-" * 129 + "x") * 600,
    "nearly blank": ("\n" * 299 + "x") * 1000,
    "quotes": '"' * 30_000,
    "open quotes": "“a" * 30_000,
    "dollars": "$a" * 30_000,
    "backticks": "`a" * 30_000,
    "fences": "```\n" * 8000,
    "tags": "<|" * 30_000,
    "thoughts": "<think>" * 8000,
    "brackets": "\\(" * 30_000,
    "addresses": "https://a" * 8000,
    "long address": "https://" + "a" * 60_000,
    "pipes": "| a " * 8000,
    "CJK": "".join(random.Random(1).choices("天地玄黄宇宙洪荒日月盈昃辰宿列张", k=16_000)),  # noqa: S311
    "nearly periodic": " ".join(("a b c d e f g h i j " * 4 + f"x{n}") for n in range(200)),
    "apologies": "I'm sorry, but " * 4000,
    "openings": "I understand that " * 4000,
    "as an AI": "as an ai language model " * 3000,
    "抱歉": "抱歉，" * 8000,
    "作为": "作为一个" * 8000,
    "here is": "I can't help. but " + "here is " * 8000,
    "however": "I can't help. " + "however " * 8000,
    "numbers": "0 " * 16_000,
    "underscores": "_" * 60_000,
    "one long word": "".join(random.Random(2).choices("abcdefgh", k=60_000)),  # noqa: S311
}


@pytest.mark.parametrize("kind", LONG)
def test_time_is_bounded_on_long_replies(kind: str) -> None:
    """8,000 tokens of any kind, as question and as reply, in processor time; backtracking would take minutes."""
    started = time.process_time()
    faults_of(LONG[kind], LONG[kind], "length")
    faults_of("天空为什么是蓝色的？", LONG[kind], "length")
    assert time.process_time() - started < 3


@given(question=st.text(max_size=40), reply=st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_is_judged_and_the_same_way_twice(question: str, reply: str) -> None:
    """No crash, lone marks and all; the record goes to JSON and back."""
    found = faults_of(question, reply, "eos")
    assert found == faults_of(question, reply, "eos")
    assert Faults.model_validate_json(found.model_dump_json()) == found
