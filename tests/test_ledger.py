"""Who gets which episodes, what counts, and what the ledger's file says of it."""

import json
import random
from pathlib import Path

import pytest

from lerobot_pirl.ledger import EVALUATION, MAX_REFUSALS, MAX_SHARE, Ledger, LedgerFile

NOW = 0.0


def opened(
    count: int, *actors: str, slots: int = 2, version: int = 0, evaluate: bool = False, **options
) -> Ledger:
    """Return a ledger of which one iteration is to be collected, by some actors."""
    ledger = Ledger(count, **options)
    ledger.open(version, 100, evaluate)
    for actor in actors:
        ledger.join(actor, slots, NOW)
    return ledger


def hand(ledger: Ledger, actor: str, strangers: int = 0, now: float = NOW) -> list[int]:
    return ledger.hand(actor, strangers, now)


def read_ledger(path: Path) -> dict[int, dict[int, tuple[str, int]]]:
    """Return what a run was trained on, from its files: iteration -> number -> actor and policy version that acted.

    A number that stands twice is an error; what a resume does again counts once.
    """
    trained: dict[int, dict[int, tuple[str, int]]] = {}
    full = sorted(path.parent.glob("ledger.*.jsonl"), key=lambda each: int(each.suffixes[0][1:]))
    for line in map(json.loads, "".join(each.read_text() for each in (*full, path)).splitlines()):
        if line["state"] == "resumed":
            trained = {each: numbers for each, numbers in trained.items() if each <= line["iteration"]}
        elif line["state"] == "trained":
            for number in line["numbers"]:
                assert all(number not in numbers for numbers in trained.values()), number
                of_iteration = trained.setdefault(line["iteration"], {})
                of_iteration[number] = line["actor"], line["policy_version"]
    return trained


# --- shares ---------------------------------------------------------------------------------------------------


def test_a_lone_actor_gets_everything_at_once():
    ledger = opened(64, "a")
    assert hand(ledger, "a") == list(range(64))
    assert hand(ledger, "a") == []


def test_a_message_holds_no_more_numbers_than_it_may():
    ledger = opened(MAX_SHARE + 5, "a")
    assert len(hand(ledger, "a")) == MAX_SHARE


def test_what_is_left_for_actors_that_have_not_asked_yet():
    assert len(hand(opened(64, "a"), "a", strangers=3)) == 8


def test_large_shares_come_first_and_small_ones_last():
    """Actors of equal pace, each done with an episode in turn, end within one episode of each other."""
    ledger = opened(64, *"abcd")
    sizes, done = [], dict.fromkeys("abcd", 0)
    while ledger.missing(0):
        for actor in "abcd":
            if numbers := hand(ledger, actor):
                sizes.append(len(numbers))
            held = ledger.peers[actor].holds
            if held:
                ledger.accept(actor, min(held), 0)
                done[actor] += 1
    assert sizes[:4] == [8, 8, 8, 8]
    assert sizes[-4:] == [1, 1, 1, 1]
    assert sum(sizes) == 64
    assert max(done.values()) - min(done.values()) <= 1


def test_an_actor_gets_more_while_all_its_environments_are_busy_and_not_before():
    ledger = opened(64, "a", "b")
    assert len(hand(ledger, "a")) == 16
    for number in range(13):
        assert hand(ledger, "a") == []
        ledger.accept("a", number, 0)
    # three are left for two environments
    assert len(ledger.peers["a"].holds) == 3
    assert hand(ledger, "a") == []
    ledger.accept("a", 13, 0)
    assert len(hand(ledger, "a")) > 0


def test_an_actor_with_more_environments_gets_more():
    ledger = Ledger(60)
    ledger.open(0, 1, False)
    ledger.join("small", 2, NOW)
    ledger.join("large", 10, NOW)
    assert len(hand(ledger, "small")) == 5
    assert len(hand(ledger, "large")) == 25


def test_the_evaluation_comes_first_whole_and_alone():
    ledger = opened(8, "a", "b", evaluate=True)
    assert hand(ledger, "a") == [EVALUATION]
    assert hand(ledger, "a") == []
    assert EVALUATION not in hand(ledger, "b")
    ledger.accept("a", EVALUATION, 0)
    assert hand(ledger, "a")
    assert EVALUATION not in ledger.delivered


def test_numbers_of_an_iteration_are_those_of_its_version():
    ledger = opened(4, "a", version=3)
    assert hand(ledger, "a") == [12, 13, 14, 15]
    assert ledger.missing(3) == 4


def test_nothing_is_handed_out_after_the_last_iteration():
    ledger = Ledger(4)
    ledger.open(5, 5, False)
    ledger.join("a", 2, NOW)
    assert hand(ledger, "a") == []


def test_opening_a_version_again_changes_nothing():
    ledger = opened(4, "a", "b", slots=1)
    taken = hand(ledger, "a")
    ledger.open(0, 100, False)
    assert sorted(taken + ledger.waiting) == [0, 1, 2, 3]


# --- actors that go -------------------------------------------------------------------------------------------


def test_what_an_actor_held_goes_to_others_and_what_it_delivered_does_not():
    ledger = opened(6, "a", "b", slots=6)
    first, second = hand(ledger, "a"), hand(ledger, "b")
    ledger.accept("a", first[0], 0)
    ledger.leave("a", "its actor left")
    assert hand(ledger, "b") == first[1:]
    assert sorted(ledger.peers["b"].holds) == sorted(first[1:] + second)
    assert ledger.lines == [
        {"state": "returned", "actor": "a", "numbers": first[1:], "reason": "its actor left"}
    ]
    ledger.leave("nobody", "its actor left")
    assert len(ledger.lines) == 1


def test_the_evaluation_of_an_actor_that_left_is_made_by_another_one():
    ledger = opened(6, "a", "b", evaluate=True)
    assert hand(ledger, "a") == [EVALUATION]
    ledger.leave("a", "its actor left")
    assert hand(ledger, "b") == [EVALUATION]


def test_an_actor_that_connects_again_gets_again_what_it_held():
    ledger = opened(6, "a")
    hand(ledger, "a")
    ledger.accept("a", 2, 0)
    ledger.join("a", 2, NOW)
    assert hand(ledger, "a") == [0, 1, 3, 4, 5]


def test_an_overdue_actor_loses_what_it_holds_until_it_is_heard_again():
    ledger = opened(8, "a", "b", slots=1)
    held, others = hand(ledger, "a"), hand(ledger, "b", now=50)
    ledger.return_overdue(60, timeout_s=60)
    assert ledger.peers["a"].holds == set(held)
    ledger.return_overdue(61, timeout_s=60)
    assert not ledger.peers["a"].holds
    assert ledger.peers["b"].holds == set(others)
    assert hand(ledger, "a", now=61) == []
    assert ledger.lines[0]["reason"] == "its actor delivered nothing for 60 s"
    # late, and first all the same
    ledger.hear("a", 62)
    assert ledger.judge(held[0], 0) is None
    ledger.accept("a", held[0], 0)
    assert held[0] not in ledger.waiting
    assert hand(ledger, "a", now=62)


def test_an_overdue_actor_does_not_get_the_evaluation_back():
    ledger = opened(4, "a", "b", evaluate=True)
    assert hand(ledger, "a") == [EVALUATION]
    ledger.return_overdue(61, timeout_s=60)
    assert hand(ledger, "a", now=61) == []
    assert hand(ledger, "b", now=61) == [EVALUATION]


def test_an_actor_without_anything_to_do_is_never_overdue():
    ledger = opened(1, "a", "b")
    hand(ledger, "a")
    ledger.return_overdue(1e9, timeout_s=60)
    assert not ledger.peers["b"].overdue
    assert hand(ledger, "b", now=1e9) == [0]
    # its time begins when it gets something
    ledger.return_overdue(1e9 + 60, timeout_s=60)
    assert ledger.peers["b"].holds == {0}


# --- what counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "version", "reason"),
    [
        (4, 1, None),
        (7, 1, None),
        (5, 1, "episode 5 was delivered before"),
        (4, 0, "episode 4 was collected with policy version 0 instead of 1"),
        (4, 2, "episode 4 was collected with policy version 2 instead of 1"),
        (3, 0, "episode 3 belongs to policy version 0, which is over"),
        (3, 1, "episode 3 belongs to policy version 0, which is over"),
        (8, 1, "episode 8 of policy version 1 was never asked for"),
        (EVALUATION, 1, "episode -1 of policy version 1 was never asked for"),
        (None, 1, "episode None of policy version 1 was never asked for"),
        (4, "1", "episode 4 of policy version '1' was never asked for"),
        (True, 1, "episode True of policy version 1 was never asked for"),
    ],
)
def test_what_counts_and_why_the_rest_does_not(number, version, reason):
    ledger = opened(4, "a", version=1)
    ledger.accept("a", 5, 1)
    assert ledger.judge(number, version) == reason


def test_what_was_trained_is_over_before_the_next_version_is_open():
    ledger = opened(2, "a")
    for number in (0, 1):
        ledger.accept("a", number, 0)
    ledger.train(0)
    assert ledger.judge(1, 0) == "episode 1 belongs to policy version 0, which is over"


def test_who_delivers_first_counts_whoever_was_to_do_it():
    ledger = opened(2, "a")
    hand(ledger, "a")
    assert ledger.judge(1, 0) is None
    ledger.accept("stranger", 1, 0)
    assert ledger.peers["a"].holds == {0}
    assert ledger.judge(1, 0) == "episode 1 was delivered before"


def test_what_is_useless_is_handed_out_again():
    ledger = opened(2, "a")
    hand(ledger, "a")
    assert ledger.reject("a", 0)
    assert ledger.waiting == [0]
    # somebody else's, and what nobody has
    assert not ledger.reject("b", 1)
    assert not ledger.reject("a", 0)
    assert ledger.waiting == [0]


def test_refused_episodes_are_counted_until_they_are_told():
    ledger = opened(2, "a")
    ledger.refuse("a", 7, 0, "because")
    ledger.refuse("a", None, None, "because")
    assert (ledger.pop_unused(), ledger.pop_unused()) == (2, 0)
    assert ledger.lines[0] == {
        "state": "refused",
        "actor": "a",
        "policy_version": 0,
        "numbers": [7],
        "reason": "because",
    }


def test_whatever_stands_for_a_number_takes_a_line_of_usual_length():
    ledger = opened(2, "a")
    for junk in ("x" * 10**6, [[1] * 10**5], 10**4000, {"a": "b" * 10**6}):
        reason = ledger.judge(junk, junk)
        ledger.refuse("a", junk if type(junk) is not int else None, [junk], reason)
    assert len(json.dumps(ledger.lines)) < 4000


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_episode_is_trained_once(seed, tmp_path):
    """Actors come, go, stall, repeat themselves and deliver late; the file has every number once, in its iteration."""
    rng = random.Random(seed)
    ledger, now = Ledger(rng.randint(1, 12)), 0.0
    file = LedgerFile(tmp_path, ledger, 0)
    sent: list[tuple[str, int, int]] = []
    for version in range(4):
        ledger.open(version, 4, evaluate=rng.random() < 0.5)
        while ledger.missing(version):
            now += rng.random() * 10
            actor = rng.choice("abcd")
            event = rng.random()
            if event < 0.2:
                ledger.join(actor, rng.randint(1, 3), now)
            elif event < 0.3:
                ledger.leave(actor, "its actor left")
            elif event < 0.4:
                ledger.return_overdue(now, 30)
            elif actor in ledger.peers:
                ledger.hand(actor, rng.randint(0, 1), now)
                held = sorted(ledger.peers[actor].holds)
                late = [rng.choice(sent)] if sent and rng.random() < 0.3 else []
                for who, number, acted in (
                    [(actor, n, version) for n in rng.sample(held, len(held) // 2 + 1)[:2]] + late
                    if held
                    else late
                ):
                    ledger.hear(who, now)
                    if number == EVALUATION:
                        ledger.accept(who, number, acted)
                    elif reason := ledger.judge(number, acted):
                        ledger.refuse(who, number, acted, reason)
                    else:
                        ledger.accept(who, number, acted)
                        sent.append((who, number, acted))
        ledger.train(version)
        file.write()
    trained = read_ledger(file.path)
    assert {each: sorted(numbers) for each, numbers in trained.items()} == {
        version + 1: list(ledger.numbers(version)) for version in range(4)
    }
    assert all(acted == each - 1 for each, numbers in trained.items() for _, acted in numbers.values())


def test_what_is_refused_leaves_nothing_large_and_no_endless_list():
    ledger = opened(2, "a")
    huge = [list(range(10_000))]
    for _ in range(MAX_REFUSALS + 50):
        ledger.refuse("a", huge, 10**300, ledger.judge(huge, 10**300))
    assert len(ledger.lines) == MAX_REFUSALS
    assert ledger.pop_unused() == MAX_REFUSALS + 50
    assert len(json.dumps(ledger.lines[0])) < 600
    assert (ledger.lines[0]["numbers"], ledger.lines[0]["policy_version"]) == ([], None)
    ledger.refuse("a", 0, 0, "because")
    assert ledger.lines[-1]["numbers"] == [0]


# --- the file -------------------------------------------------------------------------------------------------


def trained(ledger: Ledger, version: int) -> None:
    ledger.open(version, 100, False)
    for number in ledger.numbers(version):
        ledger.accept("ab"[number % 2], number, version)
    ledger.train(version)


def test_a_line_per_actor_says_what_was_trained(tmp_path):
    ledger = Ledger(3)
    file = LedgerFile(tmp_path, ledger, 0)
    trained(ledger, 0)
    file.write()
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == [
        {"state": "trained", "iteration": 1, "actor": "a", "policy_version": 0, "numbers": [0, 2]},
        {"state": "trained", "iteration": 1, "actor": "b", "policy_version": 0, "numbers": [1]},
    ]
    assert ledger.delivered == {}
    file.write()
    assert len(file.path.read_text().splitlines()) == 2


def test_what_came_in_and_was_not_trained_is_dropped_at_the_end(tmp_path):
    ledger = opened(3, "a")
    ledger.accept("a", 1, 0)
    ledger.drop("the learner was interrupted")
    assert ledger.lines == [
        {
            "state": "dropped",
            "reason": "the learner was interrupted",
            "actor": "a",
            "policy_version": 0,
            "numbers": [1],
        }
    ]


def test_a_resume_says_what_is_done_again_and_half_a_line_goes(tmp_path):
    ledger = Ledger(2)
    file = LedgerFile(tmp_path, ledger, 0)
    for version in range(3):
        trained(ledger, version)
    file.write()
    with file.path.open("a") as half:
        half.write('{"state": "trai')
    ledger = Ledger(2)
    file = LedgerFile(tmp_path, ledger, 1)
    trained(ledger, 1)
    file.write()
    assert '{"state": "trai\n' not in file.path.read_text()
    assert {each: sorted(numbers) for each, numbers in read_ledger(file.path).items()} == {
        1: [0, 1],
        2: [2, 3],
    }


def test_a_large_file_makes_room_for_a_new_one_also_across_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("lerobot_pirl.ledger.MAX_FILE_BYTES", 150)
    for done in (0, 6):
        ledger = Ledger(2)
        file = LedgerFile(tmp_path, ledger, done)
        for version in range(done, done + 8):
            trained(ledger, version)
            file.write()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(sizes) > 9
    assert set(sizes) == {"ledger.jsonl"} | {f"ledger.{n}.jsonl" for n in range(1, len(sizes))}
    assert all(size < 500 for size in sizes.values())
    assert '"iteration": 1,' in (tmp_path / "ledger.1.jsonl").read_text()
    assert list(read_ledger(file.path)) == list(range(1, 15))
    # whoever removes old ones loses no others
    (tmp_path / "ledger.1.jsonl").unlink()
    rest = read_ledger(file.path)
    for version in (14, 15):
        trained(ledger, version)
        file.write()
    assert read_ledger(file.path) == rest | {
        n: {2 * n - 2: ("a", n - 1), 2 * n - 1: ("b", n - 1)} for n in (15, 16)
    }


def test_a_resume_is_told_where_a_kill_came_before_the_new_file(tmp_path):
    (tmp_path / "ledger.1.jsonl").write_text("")
    ledger = Ledger(2)
    LedgerFile(tmp_path, ledger, 3)
    assert ledger.lines == [{"state": "resumed", "iteration": 3}]


def test_episodes_that_are_returned_over_and_over_fill_no_memory(monkeypatch):
    monkeypatch.setattr("lerobot_pirl.ledger.MAX_REFUSALS", 3)
    ledger = opened(4, "a")
    for _ in range(5):
        ledger.join("a", 4, 0.0)
        assert hand(ledger, "a") == [0, 1, 2, 3]
    assert [line["state"] for line in ledger.lines] == ["returned"] * 3
    ledger.pop_unused()
    ledger.join("a", 4, 0.0)
    assert len(ledger.lines) == 4


def test_what_a_full_disk_refuses_is_kept(tmp_path, caplog):
    ledger = Ledger(2)
    file = LedgerFile(tmp_path / "closed", ledger, 0)
    trained(ledger, 0)
    file.write()
    assert f"{tmp_path}/closed/ledger.jsonl cannot be written" in caplog.text
    with pytest.raises(OSError, match=r"ledger\.jsonl cannot be written"):
        file.flush()
    (tmp_path / "closed").mkdir()
    trained(ledger, 1)
    file.write()
    assert sorted(read_ledger(file.path)) == [1, 2]
