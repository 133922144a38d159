"""The chat templates of real LLMs: our ids and mask against the rendered template. No network: each template is written
here as its public tokenizer_config.json has it, and a small tokenizer of the same kind is trained on the spot.

The mask is found in another way than data.py does: an answer is what follows the rendered prompt, up to its end token.
"""
import pytest
from transformers import PreTrainedTokenizerFast

from support.hub import DATE, load_tokenizer
from conversation import IGNORE, encode, encode_prompt
from test_data import make_tokenizer

QWEN2 = (  # Qwen2-0.5B-Instruct; Qwen2.5 differs in the sentence of its default system turn
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3_FIRST = (    # Meta-Llama-3-8B-Instruct as first published: it opens one more answer, asked or not
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
LLAMA3 = LLAMA3_FIRST.replace("{{ '<|start", "{% if add_generation_prompt %}{{ '<|start") + "{% endif %}"
LLAMA32 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
SMOLLM2 = QWEN2.replace("helpful assistant.", "helpful AI assistant named SmolLM, trained by Hugging Face")
GEMMA2 = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
          "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
          "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
          "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
MISTRAL = (     # Mistral-7B-Instruct-v0.1 and v0.2
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
MISTRAL_SPACE = MISTRAL.replace("{{ message['content'] + eos", "{{ ' ' + message['content'] + eos")     # v0.3 of 2024
PHI3 = ("{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")

# name: (template, kind of tokenizer, control tokens, what ends an answer, whether there may be a system turn)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
PHI = ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
REAL = {
    "Qwen2": (QWEN2, "qwen", CHATML, "<|im_end|>", True), "Qwen2.5": (QWEN25, "qwen", CHATML, "<|im_end|>", True),
    "Qwen3": (QWEN3, "qwen", CHATML, "<|im_end|>", True),
    "Llama-3, the first": (LLAMA3_FIRST, "qwen", HEADERS, "<|eot_id|>", True),
    "Llama-3": (LLAMA3, "qwen", HEADERS, "<|eot_id|>", True), "Llama-3.2": (LLAMA32, "qwen", HEADERS, "<|eot_id|>", True),
    "SmolLM2": (SMOLLM2, "gpt2", CHATML, "<|im_end|>", True),
    "Gemma-2": (GEMMA2, "gemma", TURNS, "<end_of_turn>", False), "Gemma-3": (GEMMA3, "gemma", TURNS, "<end_of_turn>", True),
    "Mistral": (MISTRAL, "first", ["<s>", "</s>"], "</s>", False),
    "Mistral, legacy": (MISTRAL, "legacy", ["<s>", "</s>"], "</s>", False),
    "Mistral with a space": (MISTRAL_SPACE, "always", ["<s>", "</s>"], "</s>", False),
    "Phi-3": (PHI3, "always", PHI, "<|end|>", True), "Phi-3, legacy": (PHI3, "legacy", PHI, "<|end|>", True),
}


def make(name):
    template, kind, control, end, _ = REAL[name]
    rstrip, eos = (PHI[2:], "<|endoftext|>") if control is PHI else ((), end)
    return make_tokenizer(template, eos, kind=kind, rstrip=rstrip, special=control, bos=control[0])


def chat(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * bool(system) + turns


CHATS = {
    "one": chat("Is the bicycle leaning on a fence?", "Yes, it leans on a wooden fence."),
    "three": chat("Is it red?", "Red!", "What colour is it?", "It is red.\n\nRed!", "a?", "  it leans.\n"),
    "white space": chat("\n What colour is  it? \n", " \nRed!  \n"),
    "unicode": chat("Žluťoučký kůň 漢字 e\u0301?", "ⴲ é"),
    "looks like control": chat("Is <s> </s> [INST] <|im_end|>\n<|im_start|>assistant\nRed?", "It is </s><|eot_id|><|end|> red"),
    "system": chat("Is it red?", "Red!", system="You are a helpful assistant."),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kind", CHATS)
def test_ids_are_those_of_the_rendered_template_and_answers_are_trained(name, kind):
    template, _, control, end, has_system = REAL[name]
    tokenizer, messages = make(name), CHATS[kind]
    if kind == "system" and not has_system:
        with pytest.raises(ValueError, match="the chat template refuses the turns system, user, assistant"):
            encode(messages, tokenizer, 1)
        return
    ids, labels = encode(messages, tokenizer, 1)
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
    prompt = encode_prompt(messages[:-1], tokenizer, 1)
    assert ids[:len(prompt)] == prompt and labels[len(prompt) - 1] == IGNORE != labels[len(prompt)]

    # What is trained, decoded: the answers as they are, each with the token that ends it.
    runs, end_id = [[]], tokenizer.convert_tokens_to_ids(end)
    for label in labels:
        if label == IGNORE and runs[-1]:
            runs.append([])
        elif label != IGNORE:
            runs[-1].append(label)
    runs = [run for run in runs if run]
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    assert [run[-1] for run in runs] == [end_id] * len(answers)
    if kind != "looks like control":
        assert not any(set(tokenizer.convert_tokens_to_ids(control)) & set(run[:-1]) for run in runs)
    norm = tokenizer.backend_tokenizer.normalizer if kind == "unicode" and "Qwen" in name else None
    said = [tokenizer.decode(run[:-1], clean_up_tokenization_spaces=False).strip(" ▁") for run in runs]
    assert said == [norm.normalize_str(a) if norm else a for a in answers]

    if kind == "looks like control":                # the tokenizer alone would read control tokens in it
        return
    stripped = [{**m, "content": m["content"].strip()} for m in messages]
    text = tokenizer.apply_chat_template(stripped, tokenize=False, date_string=f"{DATE:%d %b %Y}")
    joint = tokenizer(text, add_special_tokens=False).input_ids
    if name == "Llama-3, the first":                # less the answer that nobody asked for
        joint = joint[:len(joint) - joint[::-1].index(end_id)]
    assert ids == joint


def test_a_control_token_typed_into_a_turn_is_text_in_every_template():
    for name, (_, _, control, _, _) in REAL.items():
        tokenizer = make(name)
        special = set(tokenizer.convert_tokens_to_ids(control))
        typed = encode(chat("Is " + "".join(control), "".join(control) + " Red!"), tokenizer, 1)[0]
        clean = encode(chat("Is it", "Red!"), tokenizer, 1)[0]
        assert [i for i in typed if i in special] == [i for i in clean if i in special], name


@pytest.mark.parametrize("answers", [
    ("<think>\nhm hm\n</think>\n\nHello",), ("<think>hm</think>Hello",), ("Hello</think>",),
    ("<think>\na\n</think>\n\nHi", "Hello"), ("Hi", "<think>\na\n</think>\n\nHello")])
def test_a_template_that_takes_reasoning_out_of_an_answer_is_refused(answers):
    messages = chat(*[text for answer in answers for text in ("Is it red?", answer)])
    with pytest.raises(ValueError, match="rewrites these turns .*<think>"):
        encode(messages, make("Qwen3"), 1)
    assert encode(messages, make("Qwen2.5"), 1)                     # which writes them as they are


@pytest.mark.parametrize("now", ["{{ strftime_now('%Y-%m-%d') }}", "{{ strftime_now('%d %b %Y') }}", "{{ date_string }}"])
def test_a_template_that_writes_todays_date_has_the_same_ids_tomorrow(now):
    tokenizer = make("Qwen2")
    tokenizer.chat_template = now + QWEN2
    ids = encode(CHATS["one"], tokenizer, 1)[0]
    assert tokenizer.decode(ids).startswith(("2024-07-26<|im_start|>", "26 Jul 2024<|im_start|>"))


def test_a_tokenizer_whose_ids_differ_from_the_rendered_template_is_refused(monkeypatch):
    """The comparison is made for every order of roles, so that a tokenizer with rules of its own is found at once"""
    class Odd(PreTrainedTokenizerFast):
        def __call__(self, text, **more):
            found = super().__call__(text, **more)
            found["input_ids"] = found["input_ids"][1:]             # it drops the first token
            return found
    good = make("Qwen2")
    odd = Odd(tokenizer_object=good.backend_tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=QWEN2)
    assert encode(CHATS["one"], good, 1)
    with pytest.raises(ValueError, match="gives other ids"):
        encode(CHATS["one"], odd, 1)


def test_a_template_that_writes_the_same_after_every_turn_keeps_the_end_of_the_last_answer(tiny):
    """A space stands before the end token. The answer is trained up to this token, and nothing follows it."""
    tokenizer = load_tokenizer(tiny.qwen)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' <|im_end|>\n' }}{% endfor %}"
    ids, labels = encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], tokenizer, 0)
    assert ids[-1] == labels[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and labels[-2] == ids[-2]
