"""How a message is cleaned: what a reader does not see goes, what poses as a letter becomes it, all else stays."""

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.text import clean, clean_start

HIDDEN = (
    "\u200b \u200d \u200c \u034f \u180e \u115f \u3164 \u061c \u2800 \ufe0f \ufe0e \ufff9 \u206a \U000e0061 \uffa0 "
    "\u1160 \u17b4 \u00ad \u2060 \u2063 \ufeff \u202e \ufe01 \U000e0101 \U0001d173 \u200d\ufe0f\u200c"
).split(" ")


@pytest.mark.parametrize("hidden", HIDDEN, ids=lambda text: "-".join(f"{ord(one):04x}" for one in text))
def test_a_word_is_read_without_what_nobody_sees(hidden):
    assert clean(f"You are a cl{hidden}ow{hidden}n.") == "You are a clown."
    assert clean(f"Ты кл{hidden}о{hidden}ун{hidden}") == "Ты клоун"
    assert clean(f"{hidden} {hidden}") == ""


@pytest.mark.parametrize(
    "text",
    [
        "👩\u200d💻 ❤\ufe0f",
        "👨\u200d👩\u200d👧\u200d👦 👍🏽",
        "🏳\ufe0f\u200d🌈 🇷🇺 🤷🏼\u200d♂\ufe0f",
        "1\ufe0f\u20e3 and #\ufe0f\u20e3",
        "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # Scotland
        "🅰 or 🅱, 🆎 or 🅾\ufe0f",
        "می\u200cخواهم",
        "क्\u200dष",
        "ശ്രീ മലയാളം",
        "ᠮᠣᠩᠭᠣᠯ\u180b",
        "⠓⠑\u2800⠇⠕",
        "葛\U000e0100城",
        "שָׁלוֹם",
        "ทำไมน้ำ",
        "½ № ™ м² ㎏ 10℃ ㅋㅋㅋ ﷺ",
        "за́мок и замо́к",
        "Việt Nam, naïve, Ångström",
    ],
)
def test_what_shapes_letters_and_emoji_stays(text):
    text = unicodedata.normalize("NFC", text)
    assert clean(text) == text


@pytest.mark.parametrize(
    "disguised, plain",
    [
        ("ｃｌｏｗｎ ５", "clown 5"),
        ("𝐜𝐥𝐨𝐰𝐧 𝓬𝓵𝓸𝔀𝓷 𝕔𝕝𝕠𝕨𝕟 𝚌𝚕𝚘𝚠𝚗", "clown clown clown clown"),
        ("ⓒⓛⓞⓦⓝ ⒞⒧⒪⒲⒩", "clown clown"),
        ("🄲🄻🄾🅆🄽 🅲🅻🅾🆆🅽 🅒🅛🅞🅦🅝", "CLOWN CLOWN CLOWN"),
        ("ᴄʟᴏᴡɴ ᶜˡᵒʷⁿ", "clown clown"),
        ("ﬂat ﬁsh", "flat fish"),
        ("Yоu аrе а сlоwn", "You are a clown"),  # Cyrillic о, а, е, с
        ("clοwn, Ꭺss, ⅽlown, օwl", "clown, Ass, clown, owl"),  # Greek, Cherokee, a Roman numeral, Armenian
        ("Ты cyкa и дypaк", "Ты сука и дурак"),  # Latin c, y, a, p
        ("вoзpacт гοда", "возраст года"),
        ("Ты дурαк", "Ты дурαк".replace("α", "а")),
        ("CУКА", "СУКА"),
        ("Канонiчную", "Канонічную"),
        ("c\u0334l\u0334o\u0334w\u0334n", "c\u0334l\u0334o\u0334w\u0334n"),  # struck through, as its reader sees
        ("c\u0301\u0316\u0334lo\u0334\u0316\u0334\u0348wn", "clown"),
        ("&#1089;lown &amp;amp;#x43E;f", "clown оf".replace("о", "o")),
    ],
)
def test_letters_in_disguise_become_what_they_look_like(disguised, plain):
    assert clean(disguised) == plain == clean(plain)


@pytest.mark.parametrize("latin, cyrillic", zip("aceopxyikABCEHIKMOPTXY", "асеорхуікАВСЕНІКМОРТХУ"))
def test_every_letter_that_looks_alike_in_both_scripts_is_read_in_either(latin, cyrillic):
    assert clean(f"w{cyrillic}w W{cyrillic}W") == f"w{latin}w W{latin}W"
    assert clean(f"ж{latin}ж Ж{latin}Ж") == f"ж{cyrillic}ж Ж{cyrillic}Ж"


@pytest.mark.parametrize(
    "text",
    [
        *("USB-кабель", "iPhone'ом", "iPhoneом", "раSSово", "руSSкий", "VPNы", "ARки", "mp3шный", "КОНТАКТ-Center"),
        *("PHPшник и PCшный", "exeшник", "HTTPшный", "ATMка"),  # all look-alikes: by the list
        *("почитай mailу", "на Windowsе", "в Twitterе"),  # a Russian ending on a foreign word, in Russian
        *("μm", "λx", "Δm = 5", "βcommand", "pεth"),
        *("Αθήνα και Ρόδος", "сор и хор", "cop, copy, exe", "ура, copy", "хех Facebook"),
    ],
)
def test_words_that_are_mixed_for_a_reason_stay(text):
    assert clean(text) == text


LETTERS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéüñçßø",
    "cyrillic": "абвгдеёжзийклмнопрстуфхцчшщъыьэюяАБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯіїєґў",
    "greek": "αβγδεζηθικλμνξοπρστυφχψωάέήΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ",
    "armenian": "աբգդեզէըթժիլխծկհձղճմյնշոչպջռսվտրցւփքօֆ",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهويپچگی",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשתםןךף",
    "devanagari": "अआइईउऊएऐओऔकखगघचछजझटठडढतथदधनपफबभमयरलवशषसहािीुूेैोौंः्",
    "thai": "กขคงจฉชซญดตถทนบปผฝพฟมยรลวสหอะาิีึืุู",
    "han": "你好世界小丑語言漢字",
    "kana": "あいうえおかきくけこアイウエオカキクケコー",
    "hangul": "안녕하세요광대ㅋㅎ",
    "georgian": "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
    "emoji": "😀🤬💩🔥🎉👍🤡❤⭐☀",
}
PLAIN = st.sampled_from(sorted(LETTERS)).flatmap(
    lambda script: st.lists(
        st.text(st.sampled_from(LETTERS[script] + "0123456789,.!?-'()"), min_size=1, max_size=12),
        min_size=1,
        max_size=6,
    ).map(" ".join)
)


@given(PLAIN)
@settings(deadline=None, max_examples=300)
def test_plain_text_of_one_script_is_left_alone(text):
    assert clean(text) == text


# What cleaning has to do with, in any order and number, beside any text.
PIECES = [
    *HIDDEN,
    *"аеоrpcхyαοɪʟᴍ🅾🅱ａ𝐜",
    "&",
    "amp;",
    "&#1086;",
    "&amp;amp;",
    "\u0301",
    "\u0316",
    "\u0f73",
    "❤",
    "👩",
    "می",
    "1",
    "\u20e3",
    "\n",
    " ",
]
NASTY = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=30).map("".join)


@given(NASTY)
@settings(deadline=None, max_examples=300)
def test_cleaning_twice_changes_nothing_whole_or_cut(text):
    assert clean(clean(text)) == clean(text)
    start = clean_start(text, 7)
    assert len(start) <= 7 and clean_start(start, 7) == start == clean(start)
    assert unicodedata.is_normalized("NFC", clean(text))


@pytest.mark.parametrize(
    "unit",
    ["\u0301\u0316", "\u0f73", "a\u200d", "❤\u200d", "&amp;", "amp;", "аb", "\u200d", "🅾", "ɪ", "1\ufe0f", "\ud800"],
)
def test_a_message_of_one_thing_repeated_is_read_in_steps_of_its_length(unit):
    """Counted in work, not in seconds: what is done for twice the length is at most little more than twice as much."""

    def calls(text):
        count = 0

        def tick(*_):
            nonlocal count
            count += 1

        sys.setprofile(tick)
        try:
            clean("&" + text)
        finally:
            sys.setprofile(None)
        return count

    once, twice = calls(unit * 4000), calls(unit * 8000)
    assert twice <= 2.2 * once + 100


def test_marks_without_end_do_not_push_the_message_out_of_sight():
    text = "Hello" + "\u0301\u0316" * 150_000 + " you idiot"
    assert clean(text) == clean_start(text, 5000) == "Hello you idiot"
