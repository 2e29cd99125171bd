"""Byte-pair merges over whole numbers: learning them, and applying them to many sequences at once.

Symbols are 0 .. base-1; merge r makes token base + r out of two earlier tokens. Applying the merges lowest rank first,
leftmost first, gives one well-defined tokenisation. `Merger.encode` finds it without merging anything: the encoding of
a prefix is the encoding of a shorter prefix plus one last token, and a sequence of tokens is the encoding of its text
exactly when each pair of neighbours is (an observation of the `bpe` crate of GitHub's rust-gems). So the
last token at each position is the longest suffix token that agrees with the last token before it, and one pass over the
positions serves thousands of sequences at a time.

Axes: n sequences, l positions.
"""

from __future__ import annotations

from operator import itemgetter

import numpy as np

FEW = 128  # up to here sequences go one by one: a pass over all at once costs the same for 1 as for 1,000
_NEVER = np.iinfo(np.int32).max
TEXT_BUDGET = 2**18  # symbols that the texts of all learned tokens have together
MOST_TABLE = 2**26  # states x symbols of the automaton that a fit leads to; files may have twice as many, no more


def learn(sequences: np.ndarray, base: int, tokens: int) -> np.ndarray:
    """The merges [m 2] that byte-pair learning finds, most frequent pair first; ties go to the smaller pair.

    A text is spelled by one token only, and texts are kept short enough for `TEXT_BUDGET`.

    Args:
        sequences: [n l] symbols. Pairs never span two sequences.
        base: number of symbols.
        tokens: number of tokens wanted, symbols included. Fewer come out when no pair occurs twice.
    """
    n, length = sequences.shape
    flat = np.full((n, length + 1), -1, np.int32)
    flat[:, :-1] = sequences
    s = flat.ravel()
    counts = np.zeros((tokens, tokens), np.int64)
    _count(counts, s, np.arange(len(s) - 1), 1)
    texts = {(i,) for i in range(base)}
    spelled: list[tuple[int, ...]] = [(i,) for i in range(base)]
    merges: list[tuple[int, int]] = []
    spent, budget = 0, min(TEXT_BUDGET, MOST_TABLE // base)
    for new in range(base, tokens):
        longest = max(2, (budget - spent) // (tokens - new))
        while True:
            a, b = divmod(int(counts.argmax()), tokens)
            if counts[a, b] < 2:
                return np.asarray(merges, np.int32).reshape(-1, 2)
            text = spelled[a] + spelled[b]
            if text not in texts and len(text) <= longest:
                break
            counts[a, b] = -_NEVER  # never looked at again
        texts.add(text)
        spent += len(text)
        spelled.append(text)
        merges.append((a, b))
        at = _leftmost(np.flatnonzero((s[:-1] == a) & (s[1:] == b)), a == b)
        near = np.unique(np.concatenate([at - 1, at, at + 1]))
        _count(counts, s, near[(near >= 0) & (near < len(s) - 1)], -1)
        s[at] = new
        keep = np.ones(len(s), bool)
        keep[at + 1] = False
        s = s[keep]
        moved = at - np.arange(len(at))
        near = np.unique(np.concatenate([moved - 1, moved]))
        _count(counts, s, near[(near >= 0) & (near < len(s) - 1)], 1)
    return np.asarray(merges, np.int32).reshape(-1, 2)


def _leftmost(at: np.ndarray, overlapping: bool) -> np.ndarray:
    """Matches of a pair without those that overlap the match just before (only a pair of equal tokens can)."""
    if not overlapping or len(at) < 2:
        return at
    starts = np.concatenate([[True], np.diff(at) != 1])
    place = np.arange(len(at)) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
    return at[place % 2 == 0]


def _count(counts: np.ndarray, s: np.ndarray, at: np.ndarray, sign: int) -> None:
    left, right = s[at], s[at + 1]
    real = (left >= 0) & (right >= 0)
    pairs, times = np.unique(left[real].astype(np.int64) * len(counts) + right[real], return_counts=True)
    counts.ravel()[pairs] += sign * times


class Merger:
    """Applies merges.

    Args:
        base: number of symbols.
        merges: [m 2] token pairs; all texts that they spell differ.

    Raises:
        ValueError: the merges spell texts that no fit leads to, and whose tables would fill the memory.
    """

    def __init__(self, base: int, merges: np.ndarray):
        self.base, self.size = base, base + len(merges)
        self.texts: list[tuple[int, ...]] = [(i,) for i in range(base)]
        left = 4 * TEXT_BUDGET
        for a, b in merges.tolist():
            left -= len(self.texts[a]) + len(self.texts[b])
            if left < 0:  # every merge may double the text: 50 of them stand for 2^50 symbols
                raise ValueError("the texts of its merges are too long")
            self.texts.append(self.texts[a] + self.texts[b])
        self.lengths = np.asarray([len(t) for t in self.texts], np.int32)
        # Of each token: its two halves and the rank of its merge; -1 for symbols.
        self._halves = [(-1, -1)] * base + [(a, b) for a, b in merges.tolist()]
        self._rank_of_pair = {(a, b): rank for rank, (a, b) in enumerate(merges.tolist())}
        # Whether a pair of tokens is its own encoding: 0 not known yet, 1 yes, 2 no. The last row is "nothing before".
        self._agree = np.zeros((self.size + 1, self.size), np.int8)
        self._agree[-1] = 1
        self._goto, self._longest, self._shorter = _suffix_automaton(self.texts, base)
        # The same tables for one sequence at a time, where plain Python is faster; filled with what is met.
        self._seen_goto: dict[int, int] = {}
        self._seen_agree: dict[int, bool] = {}
        self._lists = [table.tolist() for table in (self._longest, self._shorter, self.lengths)]

    def encode(self, grid: np.ndarray, lengths: np.ndarray, starts: np.ndarray | None = None) -> list[np.ndarray]:
        """Tokens of each row of grid [n l], of which the first lengths[i] symbols count.

        `starts` [n l] bool marks symbols that begin a word; merges never span two words.
        """
        if len(grid) <= FEW:
            cuts = [None] * len(grid) if starts is None else starts
            return [
                self._encode_one(row[:m].tolist(), None if cut is None else cut[:m].tolist())
                for row, m, cut in zip(grid, lengths.tolist(), cuts, strict=True)
            ]
        return self._encode_many(grid, lengths, starts)

    def _encode_one(self, symbols: list[int], starts: list[bool] | None) -> np.ndarray:
        longest, shorter, lengths = self._lists
        goto, agree, base, size = self._seen_goto, self._seen_agree, self.base, self.size
        last, state, word = [size], 0, 0
        for i, symbol in enumerate(symbols):
            if starts is not None and starts[i]:
                state, word = 0, i
            key = state * base + symbol
            if key not in goto:
                goto[key] = int(self._goto[state, symbol])
            state = goto[key]
            token = longest[state]
            while True:
                begin = i + 1 - lengths[token]
                key = (size if begin == word else last[begin]) * size + token
                fine = agree.get(key)
                if fine is None:
                    fine = agree[key] = self._agrees(*divmod(key, size))
                if fine:
                    break
                token = shorter[token]
            last.append(token)
        out, i = [], len(symbols)
        while i:
            out.append(last[i])
            i -= lengths[last[i]]
        return np.asarray(out[::-1], np.int32)

    def _encode_many(self, grid: np.ndarray, lengths: np.ndarray, starts: np.ndarray | None) -> list[np.ndarray]:
        order = np.argsort(-lengths, kind="stable")
        grid, lengths = np.ascontiguousarray(grid[order].T), lengths[order]
        starts = None if starts is None else np.ascontiguousarray(starts[order].T)
        n = len(order)
        steps = int(lengths[0]) if n else 0
        active = n - np.searchsorted(lengths[::-1], np.arange(steps), side="right")
        last = np.empty((steps + 1, n), np.int32)  # last token of the encoding of the first i symbols
        last[0] = self.size
        flat_last, flat_agree, flat_goto = last.ravel(), self._agree.ravel(), self._goto.ravel()
        state, word, column = np.zeros(n, np.int32), np.zeros(n, np.int32), np.arange(n)
        for i in range(steps):
            m = int(active[i])
            if starts is not None:
                first = starts[i, :m]
                state[:m][first] = 0
                word[:m][first] = i
            state[:m] = flat_goto.take(state[:m] * self.base + grid[i, :m])
            token = self._longest.take(state[:m])
            todo, trial = column[:m], token
            while True:
                begin = i + 1 - self.lengths.take(trial)
                before = flat_last.take(begin * n + todo)
                if starts is not None:
                    before[begin == word.take(todo)] = self.size
                key = before * self.size + trial
                agree = flat_agree.take(key)
                if not agree.all():  # pairs met for the first time
                    for new in set(key[agree == 0].tolist()):
                        flat_agree[new] = 1 if self._agrees(*divmod(new, self.size)) else 2
                    agree = flat_agree.take(key)
                no = np.flatnonzero(agree == 2)
                if not len(no):
                    break
                todo = todo.take(no)
                trial = self._shorter.take(trial.take(no))
                token[todo] = trial
            last[i + 1, :m] = token
        return self._walk_back(last, lengths, order)

    def _walk_back(self, last: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
        n = len(order)
        found, where, place = [], np.arange(n), lengths.astype(np.int64)
        where, place = where[place > 0], place[place > 0]
        rows = []
        while len(where):
            tokens = last[place, where]
            found.append(tokens)
            rows.append(where)
            place = place - self.lengths[tokens]
            go_on = place > 0
            where, place = where[go_on], place[go_on]
        if not found:
            return [np.zeros(0, np.int32) for _ in range(n)]
        tokens, rows = np.concatenate(found)[::-1], order[np.concatenate(rows)][::-1]
        by_row = np.argsort(rows, kind="stable")
        return np.split(tokens[by_row].astype(np.int32), np.cumsum(np.bincount(rows, minlength=n))[:-1])

    def _agrees(self, left: int, right: int) -> bool:
        """Whether the texts of two tokens, put together, encode to just these two.

        Undoes the merges inside both, latest first. At each moment two tokens touch at the seam; had there been a merge
        for them, it would have come before the merge that in truth used the left one (if of lower rank) or the right
        one (if of lower or equal rank, since leftmost comes first).
        """
        if left == self.size:
            return True  # nothing before
        limit_left = limit_right = _NEVER
        while True:
            rank = self._rank_of_pair.get((left, right), _NEVER)
            if rank < limit_left and rank <= limit_right and rank != _NEVER:
                return False
            if left < self.base and right < self.base:
                return True
            if left > right:  # tokens are numbered by rank
                limit_left, left = left - self.base, self._halves[left][1]
            else:
                limit_right, right = right - self.base, self._halves[right][0]


def spell(table: dict[int, bytes], ids: list[int]) -> bytes:
    """What the ids stand for, put together (itemgetter: one C loop over the ids). KeyError: an id that is not there."""
    return b"".join(itemgetter(*ids)(table)) if len(ids) > 1 else b"".join([table[i] for i in ids])


def _suffix_automaton(texts: list[tuple[int, ...]], base: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aho-Corasick over the token texts.

    Returns: goto [states base]; the longest token that is a suffix of what a state has read [states]; for each token
    the longest token that is a proper suffix of it [tokens], -1 for single symbols.
    """
    children: list[dict[int, int]] = [{}]
    node_of, own = [], {}
    for token, text in enumerate(texts):
        node = 0
        for symbol in text:
            if symbol not in children[node]:
                children[node][symbol] = len(children)
                children.append({})
            node = children[node][symbol]
        node_of.append(node)
        own[node] = token
    if len(children) * base > 2 * MOST_TABLE:
        raise ValueError("the texts of its merges have too many beginnings")
    goto = np.zeros((len(children), base), np.int32)
    fail = np.zeros(len(children), np.int32)
    longest = np.full(len(children), -1, np.int32)
    shorter = np.full(len(texts), -1, np.int32)
    for symbol, child in children[0].items():
        goto[0, symbol] = child
    level = list(children[0].values())
    while level:
        deeper = []
        for node in level:
            token = own.get(node)
            if token is not None:
                shorter[token] = longest[fail[node]]
            longest[node] = longest[fail[node]] if token is None else token
            goto[node] = goto[fail[node]]
            for symbol, child in children[node].items():
                fail[child] = goto[node, symbol]
                goto[node, symbol] = child
                deeper.append(child)
        level = deeper
    return goto, longest, shorter
