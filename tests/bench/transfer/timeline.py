"""What a run's timeline says about recovery. Pure functions; times in seconds since the window's start."""

HORIZON = 0.02  # goodput is an average over at least this long


def cumulative(row):
    """[(seconds, bytes until then)] at the edges of the buckets."""
    bucket = row["timeline"]["bucket_ms"] / 1e3
    total, points = 0, [(0.0, 0)]
    for index, count in enumerate(row["timeline"]["bytes"]):
        total += count
        points.append(((index + 1) * bucket, total))
    return points


def recovery(row, start, end, wanted):
    """Seconds from `start` until the earliest moment from which the average goodput over every horizon from 20 ms up to
    `end` is at least `wanted` bytes per second. None when there is no such moment."""
    points = [p for p in cumulative(row) if start <= p[0] <= end]
    # From the right: at moment i all averages to later points must reach `wanted`, that is, the line of that slope
    # through i stays below the curve from 20 ms on.
    for index, (at, done) in enumerate(points):
        later = [p for p in points[index:] if p[0] >= at + HORIZON]
        if not later:
            return None
        if all(total - done >= wanted * (moment - at) for moment, total in later):
            return at - start
    return None


def lost_seconds(row, start, end, rate):
    """How much of [start, end] was lost, in seconds of `rate`; never below 0."""
    points = [p for p in cumulative(row) if start <= p[0] <= end]
    moved = points[-1][1] - points[0][1]
    return max(0.0, points[-1][0] - points[0][0] - moved / rate)


def stall(row, start, end, wanted):
    """The longest stretch, in seconds, of buckets of [start, end] that each moved less than `wanted` bytes per second."""
    bucket = row["timeline"]["bucket_ms"] / 1e3
    longest = length = 0
    for index, count in enumerate(row["timeline"]["bytes"]):
        if start <= index * bucket and (index + 1) * bucket <= end:
            length = length + 1 if count < wanted * bucket else 0
            longest = max(longest, length)
    return longest * bucket


def goodput(row, start, end):
    points = [p for p in cumulative(row) if start <= p[0] <= end]
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


def back_on_rail(row, rail, start, end, wanted):
    """Seconds from `start` until a rail carries at least `wanted` bytes per second, averaged over 200 ms. None if never."""
    samples = [(s["seconds"], s["bytes"][rail]) for s in row["rail_samples"] if start - 0.05 <= s["seconds"] <= end]
    for at, done in samples:
        later = next((s for s in samples if s[0] >= at + 0.2), None)
        if later is None:
            return None
        if later[1] - done >= wanted * (later[0] - at):
            return max(0.0, at - start)
    return None
