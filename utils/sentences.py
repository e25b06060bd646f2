"""A small grammar of spoken commands of about 65 different words, written for the synthetic corpus."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

SLOTS = {
    "NAME": ["anna", "peter", "maria", "david", "julia", "thomas", "emma", "oscar"],
    "DIGIT": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "NUMBER": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twenty", "thirty", "forty"],
    "HOUR": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    "THING": ["light", "lamp", "heater", "fan", "radio", "music"],
    "ROOM": ["kitchen", "bedroom", "office", "garden"],
    "OPENING": ["door", "window", "gate"],
    "STATE": ["on", "off"],
    "CHANGE": ["up", "down"],
}
TEMPLATES = [
    "turn STATE the THING",
    "turn the ROOM THING STATE",
    "turn STATE the ROOM THING please",
    "turn the THING CHANGE",
    "open the OPENING",
    "open the ROOM OPENING please",
    "close the OPENING",
    "close the ROOM OPENING",
    "call NAME",
    "call NAME at HOUR",
    "call NAME in the ROOM",
    "tell NAME to wait",
    "tell NAME to call NAME",
    "ask NAME to open the OPENING",
    "send a message to NAME",
    "send NAME a message please",
    "wake me at HOUR",
    "set a timer for NUMBER minutes",
    "play track NUMBER",
    "play the radio in the ROOM",
    "stop the THING",
    "volume CHANGE please",
    "is NAME in the ROOM",
    "DIGIT DIGIT",
    "DIGIT DIGIT DIGIT",
    "DIGIT DIGIT DIGIT DIGIT",
    "DIGIT DIGIT DIGIT DIGIT DIGIT",
]


def draw(rng: random.Random) -> str:
    """A command of two to six words, in lower case."""
    words = rng.choice(TEMPLATES).split()
    return " ".join(rng.choice(SLOTS[word]) if word in SLOTS else word for word in words)


def vocabulary() -> set[str]:
    """All words that a command can hold."""
    fixed = {word for template in TEMPLATES for word in template.split() if word not in SLOTS}
    return fixed.union(*SLOTS.values())
