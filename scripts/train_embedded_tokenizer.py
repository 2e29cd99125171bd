"""Train the small SentencePiece model that the `paligemma` tokenizer plugin carries (presets `tiny` and `small`).

It keeps PaliGemma's conventions in 4,096 pieces: pad, eos, bos, unk = 0..3, runs of newlines and blanks, byte fallback,
digits apart, no dummy prefix, and at the end <loc0000>..<loc1023>, <seg000>..<seg127>. All text it learns from is made
here from word lists, so the model is ours to ship and everything runs offline.

    python scripts/train_embedded_tokenizer.py            # writes the plugin's embedded.model, same bytes every time
"""

from __future__ import annotations

import argparse
import io
import random
import struct
from pathlib import Path

TARGET = Path(__file__).parents[1] / "plugins/tokenizers/paligemma/src/vla_tokenizer_paligemma/embedded.model"
VOCAB, LOCS, SEGS = 4096, 1024, 128
LINES = 60_000

VERBS = (
    "pick up, grasp, lift, take, grab, hold, place, put, set, drop, release, move, push, pull, slide, rotate, turn, twist, flip, open, close, "
    "shut, press, touch, reach, insert, plug, unplug, remove, stack, unstack, sort, arrange, align, pour, stir, scoop, spread, wipe, clean, wash, "
    "dry, fold, unfold, hang, throw, toss, hand over, give, bring, carry, fetch, find, point at, look at, follow, approach, unscrew, screw, cut, "
    "slice, peel, mix, shake, squeeze, tie, untie, zip, button, cover, uncover, fill, empty, load, unload, pack, unpack, switch on, switch off"
).split(", ")
ADJECTIVES = (
    "red, green, blue, yellow, orange, purple, black, white, brown, grey, pink, small, large, big, tiny, tall, short, long, round, square, flat, "
    "soft, hard, heavy, light, empty, full, left, right, upper, lower, middle, front, back, nearest, other, first, second, last, metal, wooden, "
    "plastic, glass, paper, clean, dirty, dark, bright, open, closed, top, bottom, wet, dry, hot, cold, new, old"
).split(", ")
OBJECTS = (
    "cup, mug, bowl, plate, spoon, fork, knife, bottle, can, box, drawer, door, cabinet, shelf, table, chair, basket, bin, tray, pan, pot, lid, "
    "towel, cloth, shirt, sock, book, pen, pencil, marker, cube, block, ball, cylinder, disc, ring, peg, hole, button, switch, lever, handle, "
    "knob, faucet, sink, stove, oven, microwave, fridge, toaster, kettle, sponge, brush, soap, banana, apple, orange, lemon, carrot, potato, "
    "tomato, egg, bread, cheese, milk, juice, coffee, tea, butter, chocolate pudding, cream cheese, ketchup, salad dressing, alphabet soup, "
    "wine bottle, moka pot, frying pan, caddy, rack, hanger, rope, cable, wire, plug, socket, screw, bolt, nut, hammer, screwdriver, wrench, "
    "pliers, tape, scissors, stapler, eraser, card, coin, key, lock, bag, toy, doll, car, truck, robot, gripper, arm, hand, camera, phone, "
    "laptop, keyboard, mouse, monitor, lamp, pillow, blanket, window, curtain, trash, paper, napkin, leaf, flower, vase, target, goal, zone, area"
).split(", ")
RELATIONS = (
    "on, in, into, onto, under, above, below, behind, in front of, next to, beside, near, between, inside, outside, to the left of, "
    "to the right of, on top of, at the back of, at the front of, across from, around, over, from, off, out of, towards, against, through, with"
).split(", ")
ADVERBS = "slowly, carefully, quickly, gently, firmly, with the left arm, with the right arm, with both hands, again, twice, now, then, please".split(", ")
WORDS = (
    "the of and to a in is it you that he was for on are with as his they be at one have this from or had by not but what all were we when your "
    "can said there use an each which she do how their if will up other about out many then them these so some her would make like him into time "
    "has look two more write go see number no way could people my than first water been call who its now find long down day did get come made may "
    "part over new sound take only little work know place year live me back give most very after thing our just name good sentence man think say "
    "great where help through much before line right too mean old any same tell boy follow came want show also around form three small set put end "
    "does another well large must big even such because turn here why ask went men read need land different home us move try kind hand picture "
    "again change off play spell air away animal house point page letter mother answer found study still learn should world high every near add "
    "food between own below country plant last school father keep tree never start city earth eye light thought head under story saw left few while "
    "along might close something seem next hard open example begin life always those both paper together got group often run important until "
    "children side feet car mile night walk white sea began grow took river four carry state once book hear stop without second later miss idea "
    "enough eat face watch far really almost let above girl sometimes mountain cut young talk soon list song being leave family action task robot "
    "policy model token state image camera gripper joint velocity position angle force torque prompt plan step episode dataset training language "
    "vision instruction subtask success failure reward observation environment simulation trajectory demonstration object target scene yes no"
).split()
CASES = (str.lower, str.lower, str.lower, str.capitalize, str.capitalize, str.upper)


def thing(r: random.Random) -> str:
    """A noun phrase."""
    adjectives = " ".join(r.sample(ADJECTIVES, r.choice((0, 0, 1, 1, 2))))
    return " ".join(filter(None, (r.choice(("the", "the", "the", "a", "")), adjectives, r.choice(OBJECTS))))


def instruction(r: random.Random) -> str:
    """A robot instruction."""
    text = f"{r.choice(VERBS)} {thing(r)}"
    if r.random() < 0.7:
        text += f" {r.choice(RELATIONS)} {thing(r)}"
    if r.random() < 0.3:
        text += f" and {r.choice(VERBS)} {r.choice(('it', thing(r)))}"
    if r.random() < 0.2:
        text += f" {r.choice(ADVERBS)}"
    return r.choice(CASES)(" ".join(text.split())) + r.choice(("", "", "", ".", "!", "?"))


def line(r: random.Random) -> str:
    """One line of training text."""
    kind = r.random()
    if kind < 0.45:
        return instruction(r)
    if kind < 0.7:
        state = " ".join(str(r.randint(-1, 255)) for _ in range(r.choice((3, 6, 7, 8, 14, 32))))
        return f"Task: {instruction(r)}, State: {state};\nAction: " + r.choice(("", "|"))
    if kind < 0.8:
        return f"Q: what is {thing(r)} {r.choice(RELATIONS)} {thing(r)}? A: {thing(r)}.\n"
    if kind < 0.88:
        return f"Plan: 1. {instruction(r)} 2. {instruction(r)}\nSubtask: {instruction(r)}\n"
    if kind < 0.92:
        return f"{r.choice(('caption', 'detect', 'segment', 'answer', 'ocr'))} en {thing(r)} ; {thing(r)}\n"
    return r.choice(CASES)(" ".join(r.choices(WORDS, k=r.randint(4, 12)))) + r.choice((".", ",", ":", ";", "\n", ""))


def appended_piece(text: str) -> bytes:
    """One more `pieces` entry (user defined, score 0) for a serialised ModelProto: protobuf lists grow by appending."""
    name = text.encode()
    entry = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
    return b"\x0a" + bytes([len(entry)]) + entry


def train() -> bytes:
    """The model file; the same bytes on every run."""
    import sentencepiece

    r = random.Random(0)
    symbols = ["\n" * k for k in range(1, 9)] + ["\u2581" * k for k in range(2, 17)]
    symbols += ["<image>", "<mask>", *(f"<unused{i}>" for i in range(32))]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line(r) for _ in range(LINES)]),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCAB - LOCS - SEGS,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        user_defined_symbols=symbols,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        num_threads=1,
        minloglevel=1,
    )  # fmt: skip
    pieces = [f"<loc{i:04d}>" for i in range(LOCS)] + [f"<seg{i:03d}>" for i in range(SEGS)]
    return out.getvalue() + b"".join(map(appended_piece, pieces))


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET)
    out: Path = parser.parse_args().out
    out.write_bytes(train())
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
