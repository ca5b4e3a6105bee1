"""The solver says nothing on stdout, from its construction to its answer."""

from mpq_deploy.system.highs import QuietHighs


def test_nothing_is_printed_and_the_options_hold(capfd):
    highs = QuietHighs(mip_rel_gap=0.25)
    x, y = highs.addBinary(), highs.addBinary()
    highs.addConstr(x + y <= 1)
    highs.minimize(-1 * x - 2 * y)
    assert list(highs.getSolution().col_value) == [0.0, 1.0]
    assert highs.getOptionValue("mip_rel_gap")[1] == 0.25
    assert highs.getOptionValue("threads")[1] == 1
    assert capfd.readouterr() == ("", "")
