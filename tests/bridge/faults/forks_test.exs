defmodule Tinkex.CustomLoss.Faults.ForksTest do
  # What a term does to the process that it runs in: how fast it is noticed, and who is blamed.
  use ExUnit.Case, async: false

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{TermError, WorkerError}

  @moduletag timeout: 180_000

  setup_all do
    %{pool: start_terms!(["pathological.py"], workers: 2)}
  end

  setup %{pool: pool} do
    await_all(pool)
    on_exit(fn -> assert_squaring(pool) end)
    %{before: os_pids(pool)}
  end

  test "a crash after a daemon was left behind is answered as any other crash", %{pool: pool} do
    for term <- ["calls_os_exit", "daemonizes_and_crashes"] do
      await_all(pool)
      answer = square(pool, "pathological:" <> term, timeout: 30_000)
      assert {:error, %WorkerError{reason: {:lost, [{:exited, 3}, {:exited, 3}]}}} = answer
    end
  end

  test "of a fork that returns twice one process answers", %{pool: pool, before: before} do
    {:ok, output} =
      CustomLoss.compute(pool, nil, [[-1.0]], base_loss: "pathological:returns_twice")

    assert output.record["base_loss"]["custom"] == %{"status" => 70.0}
    assert_squaring(pool)
    assert os_pids(pool) == before
  end

  test "junk on descriptor 4 reaches nobody", %{pool: pool, before: before} do
    assert square(pool, "pathological:writes_to_descriptor_4") == {:ok, 5.0}
    assert os_pids(pool) == before
  end

  test "an exception that cannot be shown is the term's", %{pool: pool} do
    assert {:error, %TermError{type: "pathological.CannotBeShown", reason: reason}} =
             square(pool, "pathological:raises_what_cannot_be_shown")

    assert reason =~ "its __str__ raised RuntimeError"
  end

  test "a worker that answers nothing but `internal` is replaced" do
    pool = start_terms!(["pathological.py"])
    [broken] = os_pids(pool)
    assert square(pool, "pathological:breaks_the_package") == {:ok, 5.0}

    for _ <- 1..3 do
      assert {:error, %WorkerError{reason: {:internal, sentence}}} =
               square(pool, nil, base_loss: :l2)

      assert sentence =~ "broken by a test"
    end

    assert_gone(broken)
    assert_squaring(pool)
  end
end
