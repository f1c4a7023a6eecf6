defmodule Tinkex.CustomLoss.TermsTest do
  # The real Python: what comes back, and what terms do to the process that they run in.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Output, RequestError, TermError, TimeoutError, WorkerError}

  @moduletag timeout: 120_000

  setup_all do
    pool =
      start_pool!(
        load: [fixture("pathological.py")],
        workers: 2,
        grace: 500,
        backoff: {10, 200},
        await_ready: true
      )

    %{pool: pool}
  end

  defp compute(pool, opts, data \\ nil, logprobs \\ [[-1.0, -2.0], [-3.0]]),
    do: CustomLoss.compute(pool, data, logprobs, opts)

  defp term(name, opts \\ []),
    do: Enum.into(opts, %{name: "#{name}", fn: "pathological:#{name}", weight: 0.5})

  # Σ x² = 14; every call is checked against it.
  defp assert_computes(pool) do
    for _ <- 1..3 do
      assert {:ok, output} = compute(pool, base_loss: "pathological:squares")
      assert output.loss_total == 14.0
      assert output.gradients == [[-2.0, -4.0], [-6.0]]
    end
  end

  # A fault of one term, and what everyone else sees of it: nothing.
  defp fault(pool, name, opts) do
    {ms, answer} = timed(fn -> compute(pool, Keyword.put(opts, :regularizers, [term(name)])) end)
    assert_computes(pool)
    {ms, answer}
  end

  describe "a composition" do
    test "has loss, gradient and record of each term", %{pool: pool} do
      assert {:ok, %Output{} = output} =
               compute(pool,
                 base_loss: "pathological:squares",
                 regularizers: [
                   term(:squares_async, weight: -0.25),
                   %{name: "l2", fn: :l2, weight: 2}
                 ],
                 step: 7
               )

      # l2 is the mean or the sum of squares, as its params say; both are linear in Σ x².
      l2 = output.record["regularizers"]["l2"]
      assert_in_delta output.loss_total, 14.0 - 3.5 + l2["contribution"], 1.0e-5
      assert output.record["schedule_step"] == 7
      assert output.record["base_loss"]["value"] == 14.0

      assert %{"value" => 14.0, "weight" => -0.25, "contribution" => -3.5, "skipped" => false} =
               output.record["regularizers"]["squares_async"]

      assert Output.flat(output)["regularizers/squares_async/contribution"] == -3.5
      [[first, second], [third]] = output.gradients
      scale = first / -1.0
      assert_in_delta second, -2.0 * scale, 1.0e-5
      assert_in_delta third, -3.0 * scale, 1.0e-5
    end

    test "returns gradients in the form of the logprobs", %{pool: pool} do
      bytes = fn floats -> for x <- floats, into: <<>>, do: <<x::float-little-32>> end
      logprobs = [{bytes.([-1.0, -2.0]), {1, 2}}, %{data: [-3.0], dtype: :float32, shape: [1]}]

      assert {:ok, %{gradients: [{gradient, {1, 2}}, %{data: [-6.0], shape: [1]}]}} =
               compute(pool, [base_loss: "pathological:squares"], nil, logprobs)

      assert gradient == bytes.([-2.0, -4.0])
    end

    test "shows datums to its terms", %{pool: pool} do
      data = [
        %{model_input: [1, 2, 3], loss_fn_inputs: %{"mask" => [1.0, 0.5]}},
        %{model_input: [4], loss_fn_inputs: %{"mask" => [2.0]}}
      ]

      assert {:ok, output} =
               compute(pool, [regularizers: [term(:sees, params: [key: "mask"])]], data)

      assert %{"seen" => 3.5, "tokens" => 4.0} = output.record["regularizers"]["sees"]["custom"]
    end

    test "without gradients has none", %{pool: pool} do
      assert {:ok, %Output{loss_total: 14.0, gradients: nil}} =
               compute(pool, base_loss: "pathological:squares", gradients: false)
    end
  end

  describe "what can be named" do
    test "is what is built in and loaded", %{pool: pool} do
      {:ok, terms} = CustomLoss.terms(pool)
      names = Enum.map(terms, & &1.name)
      assert "l2" in names and "pathological:sees" in names
      sees = Enum.find(terms, &(&1.name == "pathological:sees"))
      assert %{kind: "loaded", async: false, params: [%{name: "key", required: true}]} = sees
      assert sees.doc =~ "what a term gets to see"
    end

    test "is nothing else", %{pool: pool} do
      unknown = &compute(&1, base_loss: "os:system")
      assert {:error, %RequestError{path: "base_loss.fn"} = error} = unknown.(pool)

      assert Exception.message(error) =~
               ~r/there is no term "os:system" for the base loss; of \d+, the nearest are/

      # The same of a pool that cannot know yet what it has.
      starting =
        start_supervised!({CustomLoss, load: [fixture("pathological.py")]}, id: :starting)

      assert unknown.(starting) == {:error, error}
    end
  end

  describe "a module that ends Python when it is imported" do
    @tag :tmp_dir
    test "does so again where the error says that it would", %{tmp_dir: tmp} do
      # A shell has to be told what is one word.
      module = Path.join(tmp, "it's mine/ends_python.py")
      File.mkdir_p!(Path.dirname(module))
      File.cp!(fixture("ends_python.py"), module)
      pool = start_supervised!({CustomLoss, load: [module], backoff: {60_000, 60_000}}, id: :ends)

      assert {:error, %WorkerError{} = error} = compute(pool, base_loss: :l2)
      assert [_, command] = Regex.run(~r/To see it again, run: (.*)$/, Exception.message(error))
      {output, status} = System.cmd("/bin/sh", ["-c", command], stderr_to_stdout: true)
      assert status == 3
      assert output =~ "there is no room at the inn"
    end
  end

  describe "bad input in Python's hands" do
    test "is a request error with its path", %{pool: pool} do
      assert {:error, %RequestError{} = error} =
               compute(pool, regularizers: [term(:squares, params: %{no_such: 1})])

      assert Exception.message(error) =~ "no_such"
      assert_computes(pool)
    end
  end

  describe "a term that" do
    setup %{pool: pool} do
      eventually(
        fn ->
          match?({:ok, %{workers: [%{state: :ready}, %{state: :ready}]}}, CustomLoss.info(pool))
        end,
        60_000
      )

      %{before: os_pids(pool)}
    end

    test "raises costs that call alone", %{pool: pool, before: before} do
      assert {_ms, {:error, %TermError{term: "raises", type: "LookupError"} = error}} =
               fault(pool, :raises, [])

      assert Exception.message(error) =~ "no such topology"
      assert error.traceback =~ "in raises"
      assert os_pids(pool) == before
    end

    test "calls sys.exit has raised", %{pool: pool, before: before} do
      assert {_ms, {:error, %TermError{type: "SystemExit"}}} = fault(pool, :calls_sys_exit, [])
      assert os_pids(pool) == before
    end

    test "returns nan is named with the place", %{pool: pool} do
      assert {_ms, {:error, %TermError{term: "returns_nan"}}} = fault(pool, :returns_nan, [])
    end

    for {name, sentence} <- [
          calls_os_exit: "exited with status 3",
          segfaults: "segmentation fault",
          is_killed: "signal 9"
        ] do
      test "#{name} is given up after two workers", %{pool: pool, before: before} do
        assert {_ms, {:error, %WorkerError{reason: {:lost, [_, _]}} = error}} =
                 fault(pool, unquote(name), [])

        assert Exception.message(error) =~ unquote(sentence)
        refute Enum.any?(before, &alive?/1)
      end
    end

    for name <- [:sleeps, :holds_the_gil] do
      test "#{name} ends at the deadline, with its process", %{pool: pool, before: before} do
        {ms, answer} =
          timed(fn -> compute(pool, regularizers: [term(unquote(name))], timeout: 1_000) end)

        assert {:error, %TimeoutError{stage: :computing}} = answer
        assert ms < 3_000
        eventually(fn -> not Enum.all?(before, &alive?/1) end, 2_500)
        assert_computes(pool)
      end
    end

    for name <- [:loops, :never_resolves] do
      test "#{name} is cancelled in its process", %{pool: pool, before: before} do
        {ms, answer} =
          timed(fn -> compute(pool, regularizers: [term(unquote(name))], timeout: 1_000) end)

        assert {:error, %TimeoutError{stage: :computing}} = answer
        assert ms < 3_000
        eventually(fn -> match?({:ok, %{in_flight: 0}}, CustomLoss.info(pool)) end)
        assert_computes(pool)
        assert os_pids(pool) == before
      end
    end

    test "prints corrupts nothing", %{pool: pool, before: before} do
      assert {_ms, {:ok, %Output{loss_total: 7.0}}} = fault(pool, :prints, [])
      assert os_pids(pool) == before
    end

    test "logs reaches Logger", %{pool: pool} do
      log =
        capture_log([metadata: [:python_logger, :term, :worker]], fn ->
          assert {_ms, {:ok, _}} = fault(pool, :logs, [])
        end)

      assert log =~ "the loss is odd"
      assert log =~ "python_logger=my.losses"
      assert log =~ "term=logs"
    end
  end
end
