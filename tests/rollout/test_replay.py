import pytest

from posttrain.records import Demo, Pair, Prompt, Segment, Source
from posttrain.rollout.replay import Replay

DEMO = Demo("d", (Segment((1, 2), Source.prompt), Segment((3,), Source.demo)))


async def test_items_pass_through_in_order():
    pair = Pair("p", DEMO, DEMO)
    replay = Replay()
    await replay.ready()
    assert await replay.sample([DEMO, pair, DEMO]) == [DEMO, pair, DEMO]
    await replay.publish(4, [], {})
    assert replay.version == 4
    replay.close()


async def test_several_answers_are_a_configuration_error():
    with pytest.raises(ValueError, match=r"rollout\.n=8"):
        await Replay().sample([DEMO], n=8)


async def test_prompts_are_refused():
    with pytest.raises(ValueError, match="got a Prompt"):
        await Replay().sample([Prompt("p", (1,))])
