import torch

from manipi.model.attention import attention_mask, joined, lay_out


def row(*values, dtype=torch.bool):
    return torch.tensor([values]).to(dtype)


def picture(mask_BTS):
    return ["".join(".x"[int(seen)] for seen in query) for query in mask_BTS[0]]


def test_prompt_then_state_then_actions():
    layout = lay_out((), row(1, 1, 1, 1, 1), row(0, 0, 1, 1, 0), row(0, 0, 0, 0, 0, dtype=torch.long))
    assert picture(attention_mask(layout, layout)) == ["xx...", "xx...", "xxx..", "xxxxx", "xxxxx"]
    assert layout.position.tolist() == [[0, 1, 2, 3, 4]]


def test_padding_is_not_seen_and_not_counted():
    layout = lay_out((), row(1, 0, 1, 1), row(0, 0, 1, 1), row(0, 0, 0, 0, dtype=torch.long))
    assert picture(attention_mask(layout, layout)) == ["x...", "....", "x.x.", "x.xx"]
    assert layout.position[layout.valid].tolist() == [0, 1, 2]


def test_branches_see_the_trunk_and_themselves_and_count_from_the_trunk():
    layout = lay_out((), row(1, 1, 1, 1, 1, 1), row(0, 0, 1, 0, 1, 0), row(0, 0, 1, 1, 2, 2, dtype=torch.long))
    assert picture(attention_mask(layout, layout)) == ["xx....", "xx....", "xxxx..", "xxxx..", "xx..xx", "xx..xx"]
    assert layout.position.tolist() == [[0, 1, 2, 3, 2, 3]]


def test_a_sequence_in_two_pieces_is_laid_out_like_one():
    torch.manual_seed(0)
    valid, starts = torch.rand(4, 12) > 0.3, torch.rand(4, 12) > 0.5
    branch = torch.tensor([0] * 6 + [1] * 3 + [2] * 3).expand(4, 12)
    whole = lay_out((), valid, starts, branch)
    first = lay_out((), valid[:, :7], starts[:, :7], branch[:, :7])
    second = lay_out((first,), valid[:, 7:], starts[:, 7:], branch[:, 7:])
    pieces = joined((first, second))
    for field in ("valid", "block", "branch", "position"):
        assert torch.equal(getattr(pieces, field), getattr(whole, field)), field
    assert torch.equal(attention_mask(second, pieces), attention_mask(whole, whole)[:, 7:])
