"""Models and tokenizers by name: a name on the Hugging Face hub, or a folder."""
import os
import re
from datetime import datetime

DATE = datetime(2024, 7, 26)            # the date that Llama-3's template writes without a clock


def from_hub(load, name, **kwargs):
    """Return load(name, **kwargs); `load` is a from_pretrained. Any error becomes a ValueError."""
    looks_like_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    is_local = os.path.isdir(name.split("/")[0]) or not looks_like_hub_name
    if is_local and not os.path.isdir(name):
        raise ValueError(f"there is no folder {name}")
    try:
        return load(name, trust_remote_code=False, **kwargs)    # code of a model is never run
    except Exception as error:              # the library raises a dozen types, most of many lines
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # A first line that ends with ":" begins a list.
        reason = " ".join(lines if lines[0].rstrip().endswith(":") else lines[:1])
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not os.path.isdir(name):
            reason = "it is no folder and not in the Hugging Face cache (--offline)"
        raise ValueError(f"{name} cannot be loaded: {reason}") from error


def load_tokenizer(name):
    """Return a tokenizer by hub name or folder. Its chat template writes one fixed date."""
    from transformers import AutoTokenizer
    tokenizer = from_hub(AutoTokenizer.from_pretrained, name)
    template = tokenizer.chat_template
    if isinstance(template, dict):                  # several templates by name
        tokenizer.chat_template = {key: freeze_date(value) for key, value in template.items()}
    elif template:
        tokenizer.chat_template = freeze_date(template)
    return tokenizer


def freeze_date(template):
    """Return a chat template that writes 26 July 2024 where it would write today's date.

    With today's date a resumed run would see other ids. The templates of Llama-3.2, SmolLM3,
    Granite and gpt-oss call the library's strftime_now, which a macro of this name replaces.
    """
    codes = [f"%{letter}" for letter in "aAbBdHIjmMpSyY"] + ["%-d", "%-m"]
    changes = "".join(f" | replace('{code}', '{DATE.strftime(code)}')" for code in codes)
    macro = "{%- macro strftime_now(format) -%}{{ format" + changes + " }}{%- endmacro -%}"
    is_frozen = "strftime_now" not in template or template.startswith(macro)
    return template if is_frozen else macro + template
