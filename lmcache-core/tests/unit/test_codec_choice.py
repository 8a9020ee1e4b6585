"""The choice of an encoding: by what each way costs on a link of the measured speed."""

from __future__ import annotations

from lmcache_core.policy.codec_choice import AS_IS, Chooser, LinkMeter, Way

LOSSLESS, LOW, HIGH = Way("zstd", ""), Way("cachegen", "low"), Way("cachegen", "high")
WAYS = (AS_IS, LOSSLESS, LOW, HIGH)
MB = 1_000_000


def learned(target_s: float = 0.0) -> Chooser:
    """zstd at 1000 MB/s and 0.7, cachegen at 200 MB/s and 0.25 or 0.19."""
    chooser = Chooser(WAYS, target_s=target_s)
    for way, stored, per_s in ((LOSSLESS, 0.7, 1000), (LOW, 0.25, 200), (HIGH, 0.19, 200)):
        chooser.encoded(way, MB, int(stored * MB), 1 / per_s)
        chooser.decoded(way, MB, 1 / per_s)
    return chooser


def test_nothing_is_encoded_before_the_link_is_known() -> None:
    assert Chooser(WAYS).choose(None, MB) == AS_IS
    assert learned().choose(None, MB) == AS_IS


def test_each_way_is_tried_once_on_a_known_link() -> None:
    chooser = Chooser(WAYS)
    tried = []
    for _ in range(3):
        way = chooser.choose(12.5 * MB, MB)
        tried.append(way)
        chooser.encoded(way, MB, MB // 2, 0.005)
    assert tried == [LOSSLESS, LOW, HIGH]


def test_the_slower_the_link_the_smaller_the_chunk() -> None:
    chosen = [learned().choose(speed * MB, MB) for speed in (1, 12.5, 125, 500, 5000)]
    assert chosen == [HIGH, HIGH, LOSSLESS, AS_IS, AS_IS]


def test_of_nearly_equal_ways_the_one_of_better_quality_is_taken() -> None:
    chooser = Chooser(WAYS)
    for way, stored in ((LOSSLESS, 0.9), (LOW, 0.20), (HIGH, 0.19)):
        chooser.encoded(way, MB, int(stored * MB), 0.0)
    assert chooser.choose(10 * MB, MB) == LOW


def test_a_target_keeps_as_much_quality_as_it_allows() -> None:
    prefix = 50 * MB
    # On 12.5 MB/s the prefix takes 4 s as it is, 2.85 s lossless, 1.25 s and 1.01 s by cachegen.
    for target_s, way in ((5.0, AS_IS), (3.0, LOSSLESS), (1.5, LOW), (1.1, HIGH), (0.1, HIGH)):
        assert learned(target_s).choose(12.5 * MB, prefix) == way


def test_a_way_that_refuses_is_not_chosen_again() -> None:
    chooser = learned()
    for _ in range(20):
        chooser.encoded(HIGH, MB, MB, 0.005)
        chooser.encoded(LOW, MB, MB, 0.005)
    assert chooser.choose(12.5 * MB, MB) == LOSSLESS


def test_a_slow_decoder_counts_more_than_its_fast_encoder() -> None:
    chooser = learned()
    chooser.decoded(HIGH, MB, 1.0)
    for _ in range(20):
        chooser.decoded(LOW, MB, 1.0)
        chooser.decoded(HIGH, MB, 1.0)
    assert chooser.choose(12.5 * MB, MB) == LOSSLESS


def test_the_meter_counts_busy_time_once_for_calls_at_the_same_time() -> None:
    meter = LinkMeter(min_bytes=100)
    assert meter.bytes_per_s is None
    meter.begin(0.0)
    meter.begin(0.0)
    meter.end(1.0, 100)
    meter.end(2.0, 100)
    assert meter.bytes_per_s == 100.0


def test_the_meter_does_not_count_idle_time() -> None:
    meter = LinkMeter(min_bytes=100)
    for start_s in (0.0, 100.0):
        meter.begin(start_s)
        meter.end(start_s + 1.0, 100)
    assert meter.bytes_per_s == 100.0


def test_the_meter_forgets_the_speed_of_long_ago() -> None:
    meter = LinkMeter(min_bytes=100, horizon_s=10.0)
    now_s = 0.0
    for rate in (1000, 10):
        for _ in range(100):
            meter.begin(now_s)
            now_s += 1.0
            meter.end(now_s, rate)
    assert meter.bytes_per_s is not None
    assert 9 < meter.bytes_per_s < 12
