"""The rulebook of clips in other words: of each rule its own text, two more that training shows, and one held out."""

from __future__ import annotations

from afrl_jax.data.clips_rules import RULES

# In the order of the rules: two wordings for training, then the one held out.
_WORDINGS = (
    ("wanted for kids but meant for adults", "kids asked and it is for adults", "adults only where kids asked"),
    ("has what the query says without", "has a feature that is not wanted", "has a feature the query rules out"),
    ("is in a language that is not wanted", "is in the language the query rules out", "a language the query excludes"),
    ("is of a kind that is not wanted", "is of the kind the query rules out", "a kind the query excludes"),
    ("is on a topic that is not wanted", "is on the topic the query rules out", "a topic the query excludes"),
    ("not the series that was named", "from a series other than asked", "the series is another one"),
    ("another creator where no topic is named", "asked by creator without a topic and not by that one",
     "no topic was asked and the creator is another"),
    ("by the creator but on another topic", "right creator but wrong topic", "the creator fits but not the topic"),
    ("not even the category of the topic", "wrong topic and wrong category", "another topic and another category"),
    ("wrong topic but right category", "another topic that is in the category", "the category fits but not the topic"),
    ("the series but another season", "wrong season of the right series", "the season is another one"),
    ("the series but another episode", "wrong episode of the right series", "the episode is another one"),
    ("reaction or parody not asked for", "only a reaction or a parody", "nobody asked for a reaction or parody"),
    ("trailer not asked for", "only a trailer", "nobody asked for a trailer"),
    ("a review or interview of the series not asked for", "only talks about the series",
     "about the series and not the series"),
    ("the topic but by another creator", "right topic and wrong creator", "the topic fits but the creator is another"),
    ("the latest was asked and it is over three years old", "much too old for the latest",
     "over three years old where the latest was asked"),
    ("two levels off", "beginner for advanced or advanced for beginner", "the level is off by two"),
    ("at least twice as long as asked", "much too long", "twice as long or more than asked"),
    ("several small misses", "more than one small miss", "small misses and not only one"),
    ("another language with subtitles", "language not as asked but subtitles", "has subtitles but the wrong language"),
    ("another language than asked", "language not as asked", "the language is another one"),
    ("compilation not asked for", "only a compilation", "nobody asked for a compilation"),
    ("one level off", "the level next to the one asked", "the level is off by one"),
    ("longer than asked", "over the length asked", "the length is over what was asked"),
    ("shorter than asked", "under the length asked", "the length is under what was asked"),
    ("kind not as asked", "not the kind that was asked", "the kind is another one"),
    ("the latest was asked and it is one to three years old", "a little too old for the latest",
     "up to three years old where the latest was asked"),
    ("year not as asked", "not the year that was asked", "the year is another one"),
    ("a feature that was asked for is not there", "without a feature that was asked", "a feature asked for is missing"),
    ("wanted for adults but meant for kids", "adults asked and it is for kids", "kids only where adults asked"),
    ("more than one thing is not stated", "several things not stated", "two things or more not stated"),
    ("does not state the season or episode", "season or episode missing", "the season or the episode is not stated"),
    ("a single thing is not stated", "does not state one thing", "one thing and only one is not stated"),
    ("the episode asked and all else right", "the episode that was asked for and nothing missed",
     "it is that very episode and nothing missed"),
    ("by the creator asked and all else is right", "right creator and nothing missed",
     "the creator and all else is right"),
    ("a category was asked and all is right", "of the category that was asked and nothing missed",
     "the category asked and nothing missed"),
    ("everything asked is met", "nothing missed", "all that was asked fits"),
)  # fmt: skip
TRAINED: tuple[tuple[str, ...], ...] = tuple((rule.text, *row[:2]) for rule, row in zip(RULES, _WORDINGS, strict=True))
HELD_OUT: tuple[str, ...] = tuple(row[2] for row in _WORDINGS)
NUMBER_OF_WORDING: dict[str, int] = {
    text: rule.number
    for rule, trained, held_out in zip(RULES, TRAINED, HELD_OUT, strict=True)
    for text in (*trained, held_out)
}
