"""Chat templates that do what those of well-known families do, written down here in as few words as that takes."""

from __future__ import annotations

_LLAMA3_TURN = (
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
)
_ASKS_LLAMA3 = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
_SPLIT = (
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
)
_ALTERNATE = (
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
_CHATML = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
_ASKS_CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

FAMILIES = {
    "chatml, yi": f"{{% for m in messages %}}{_CHATML}{{% endfor %}}{_ASKS_CHATML}",
    "qwen2.5, smollm2": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}"
        f"{{% for m in messages %}}{_CHATML}{{% endfor %}}{_ASKS_CHATML}"
    ),
    "qwen3": (
        "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in text %}"
        "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}" + _ASKS_CHATML
    ),
    "internlm2": "{{ bos_token }}{% for m in messages %}" + _CHATML + "{% endfor %}" + _ASKS_CHATML,
    "llama2": (
        _SPLIT + _ALTERNATE + "{% for m in turns %}{% set text = m['content'] %}{% if loop.first and told is defined %}"
        "{% set text = '<<SYS>>\\n' + told + '\\n<</SYS>>\\n\\n' + text %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        + _LLAMA3_TURN
        + "{% endfor %}"
        + _ASKS_LLAMA3
    ),
    "llama3.1": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + told + '<|eot_id|>' }}"
        "{% for m in messages %}" + _LLAMA3_TURN + "{% endfor %}" + _ASKS_LLAMA3
    ),
    "llama3.2": (
        "{{ bos_token }}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
        "{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
        "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + day + '\\n\\n' + told + '<|eot_id|>' }}"
        "{% for m in messages %}" + _LLAMA3_TURN + "{% endfor %}" + _ASKS_LLAMA3
    ),
    "mistral v0.1": (
        "{% set turns = messages %}" + _ALTERNATE + "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    ),
    "mistral v0.3": (
        _SPLIT + _ALTERNATE + "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}"
        "{% if loop.last and told is defined %}{{ '[INST] ' + told + '\\n\\n' + m['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma, gemma2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% set turns = messages %}" + _ALTERNATE + "{% for m in turns %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' + m['content'] | trim"
        " + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "gemma3": (
        _SPLIT + _ALTERNATE + "{{ bos_token }}{% for m in turns %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' }}"
        "{% if loop.first and told is defined %}{{ told + '\\n\\n' }}{% endif %}"
        "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "phi3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi4": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "deepseek v3, r1": (
        "{% set ns = namespace(told='', first=true) %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.told = ns.told + ('' if ns.first else '\\n\\n') + m['content'] %}{% set ns.first = false %}"
        "{% endif %}{% endfor %}{{ bos_token + ns.told }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "glm4": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
}

# What no text around the turns' own can say.
BEYOND = {
    "counts": "{% for m in messages %}{{ loop.index ~ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}",
    "shouts": "{% for m in messages %}{{ m['role'] + ':' + m['content'].upper() + '\\n' }}{% endfor %}",
    "leaves out": "{% for m in messages[-3:] %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}",
    "forgets": "{% for m in messages[-9:] %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}",
    "week day": "{{ strftime_now('%A') }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}",
    "refuses": "{{ raise_exception('never') }}",
}
