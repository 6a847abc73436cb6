"""The drawing styles of the `emoji` data set: where each is from, whose it is, and its split."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    name: str
    package: str  # npm name @ version
    family: str  # styles of one family are the same drawings: never on both sides of a split
    split: str
    licence: str  # SPDX, of the artwork
    credit: str


FLUENT = "Fluent Emoji, (c) Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"
NOTO = "Noto Emoji, (c) Google LLC, https://github.com/googlefonts/noto-emoji"
NOTO_V1 = "Noto Emoji of 2017 (blobs), (c) Google LLC, https://github.com/googlefonts/noto-emoji"
TWEMOJI = "Twemoji, (c) Twitter, Inc, jdecked and other contributors, https://github.com/jdecked/twemoji"
FXEMOJI = "FxEmojis, (c) Mozilla Foundation, https://github.com/mozilla/fxemoji"
EMOJIONE = "EmojiOne 2, (c) EmojiOne, https://github.com/EmojiTwo/emojitwo"
STREAMLINE = "Streamline Emojis, (c) Streamline, https://github.com/webalys-hq/streamline-vectors"

SHIPPED = (
    Style("fluent-3d", "@lobehub/fluent-emoji-3d@1.1.0", "fluent", "train", "MIT", FLUENT),
    Style("noto", "@iconify-json/noto@1.2.9", "noto", "train", "Apache-2.0", NOTO),
    Style("noto-v1", "@iconify-json/noto-v1@1.2.5", "noto-v1", "train", "Apache-2.0", NOTO_V1),
    Style("twemoji", "@iconify-json/twemoji@1.2.5", "twemoji", "test", "CC-BY-4.0", TWEMOJI),
)
MORE = (
    Style("fluent-flat", "@iconify-json/fluent-emoji-flat@1.2.6", "fluent", "train", "MIT", FLUENT),
    # The package says Apache-2.0: that is the license of its code. The artwork of FxEmojis is CC BY 4.0.
    Style("fxemoji", "@iconify-json/fxemoji@1.2.2", "fxemoji", "train", "CC-BY-4.0", FXEMOJI),
    Style("emojione", "@iconify-json/emojione@1.2.3", "emojione", "train", "CC-BY-4.0", EMOJIONE),
    Style(
        "streamline", "@iconify-json/streamline-emojis@1.2.4", "streamline", "train", "CC-BY-4.0", STREAMLINE
    ),
)
STYLES = SHIPPED + MORE

LABELS = "emojibase-data@17.0.0"  # MIT, (c) Miles Johnson
