"""Records of LLaVA-format files: read, checked, and turned into messages and names of images."""
import json
import re

from common import BadSample
from support.templates import IMAGE, check_text

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}

# Signs of media that are not read: names of keys, and endings of file names. Without this check the
# model would train without these media, and nobody would notice.
OTHER_KEY = re.compile(r"(video|audio|speech|system|tool)s?|(image|img)_?\d+")
OTHER_FILE = re.compile(r'\.(mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a)"')
# Where a picture stands in a text of Qwen-VL, Phi-3, Qwen2-VL and InternLM-XComposer.
OTHER_IMAGE = re.compile(r"<img>[^<>]+\.\w+</img>|<\|(image|vision|video|audio)\w*\|>|<ImageHere>")
# These are checked only in records without a picture. In a record with a picture a key such as
# "image_id" describes that picture.
MEDIUM_KEY = re.compile("image|img|picture|photo|video|audio")
PICTURE_FILE = re.compile(r'\.(jpe?g|png|gif|webp|bmp|tiff?|avif|heic)"|"data:')


def read_dicts(path):
    """Return [(place in the file, dict), ...] of a JSON list, or of an object on each line.

    ValueError names the first line or record that is not complete or no object.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        value = json.loads(content)
        found = [(f"{path}, line 1", value)]
        if isinstance(value, list):
            found = [(f"{path}: record {i}", record) for i, record in enumerate(value)]
    except (ValueError, RecursionError) as error:
        if re.match(rb"(\xef\xbb\xbf)?\s*\[", content):               # a list, perhaps after a BOM
            raise ValueError(f"{path} is not a whole JSON file: {error}") from None
        found = []
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                if line.strip():
                    found.append((f"{path}, line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not complete JSON: {error}") from None
    for place, value in found:
        if not isinstance(value, dict):
            raise ValueError(f"{place} is not a JSON object but {str(value)[:60]!r}")
    return found


def read_records(path):
    """Return what read_dicts returns. ValueError if there are no records."""
    records = read_dicts(path)
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def refuse_unread(fields, read, has_image, where):
    """Raise BadSample if a record or a turn names a medium under a key that is not in `read`."""
    for key, value in fields.items():
        if key in read or not value:
            continue
        name, text = key.lower(), json.dumps(value).lower()
        is_unread = OTHER_KEY.fullmatch(name) or OTHER_FILE.search(text)
        if not has_image:
            is_unread = is_unread or MEDIUM_KEY.search(name) or PICTURE_FILE.search(text)
        if is_unread:
            raise BadSample("malformed", f"{where} has {key[:40]!r}, which is not read")


def image_names(record):
    """Return a list of a record's image names. LLaMA-Factory has them under "images"."""
    keys = [key for key in ("image", "images") if record.get(key) not in (None, [])]
    if len(keys) == 2:
        raise BadSample("malformed", "there are pictures under 'image' and under 'images'")
    names = record[keys[0]] if keys else []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadSample("malformed", f"{keys[0]!r} is neither a file name nor a list of file names")
    return names


def turns_of(record):
    """Return the turns of a LLaVA record as they stand: messages for encode. Raises BadSample."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSample("malformed", "'conversations' is missing or empty")
    messages = []
    for i, turn in enumerate(turns):
        keys = ("from", "value")
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in keys):
            raise BadSample("malformed", f"turn {i} lacks a text under 'from' or 'value'")
        if turn["from"] not in ROLES:
            raise BadSample("malformed", f"turn {i} is from {turn['from'][:40]!r}, "
                                         f"which is not one of {', '.join(ROLES)}")
        check_text(turn["value"], i)
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    return messages


def messages_of(record, image_first=True):
    """Return (messages for encode, list of image names) of a LLaVA record. Raises BadSample.

    The images have the order of the "<image>" in the human turns. If no turn has an "<image>", they
    go before the first human turn. If there is one image and image_first is true, its "<image>"
    moves to the front of its turn, as in LLaVA.
    """
    names = image_names(record)
    messages = turns_of(record)
    refuse_unread(record, ("id", "image", "images", "conversations"), names, "the record")
    expected = ("user", "system")
    for i, message in enumerate(messages):
        role, content, turn = message["role"], message["content"], record["conversations"][i]
        refuse_unread(turn, ("from", "value"), False, f"turn {i}")
        if role not in expected:
            raise BadSample("malformed", f"turn {i} is from {turn['from']!r}; "
                                         "human and gpt must alternate, human first")
        expected = ("assistant",) if role == "user" else ("user",)
        if not content.strip():
            raise BadSample("malformed", f"turn {i} is empty")
        for key in ("loss", "weight", "train"):         # of ms-swift, OpenAI and axolotl
            if role == "assistant" and turn.get(key) not in (None, True):
                raise BadSample("malformed", f"turn {i} has {key!r} {str(turn[key])[:40]}, which is"
                                             " not read: every answer is trained")
        other = OTHER_IMAGE.search(content)
        if other:
            raise BadSample("malformed", f"turn {i} holds {other[0][:40]!r}, which is not read: a "
                                         f"picture is written '{IMAGE}'")
        if role != "user" and IMAGE in content:
            raise BadSample("malformed", f"turn {i} is from {turn['from']!r} and holds '{IMAGE}'")

    users = [message for message in messages if message["role"] == "user"]
    count = sum(user["content"].count(IMAGE) for user in users)
    if names and users and count == 0:
        users[0]["content"] = (IMAGE + "\n") * len(names) + users[0]["content"]
    elif count != len(names):
        raise BadSample("malformed", f"{len(names)} image(s) but {count} '{IMAGE}' in human turns")
    elif count == 1 and image_first:
        user = next(user for user in users if IMAGE in user["content"])
        rest = user["content"].replace(IMAGE, "").strip()
        user["content"] = (IMAGE + "\n" + rest).strip()
    return messages, names
