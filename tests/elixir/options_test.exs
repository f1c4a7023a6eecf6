defmodule Tinkex.CustomLoss.OptionsTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Options

  defp message(fun), do: Exception.message(assert_raise(ArgumentError, fun))

  describe "a pool" do
    test "has defaults for everything" do
      assert %{name: nil, workers: 1, threads: 1, max_in_flight: 4, await_ready: false} =
               Options.start!([])
    end

    for {option, value, expected} <- [
          {:workers, 0, "a positive integer"},
          {:workers, 1.5, "a positive integer"},
          {:max_queue, -1, "an integer that is not negative"},
          {:max_frame, 10, "an integer from 1048576 to 4294967295"},
          {:python, "", "a path or the name of a program"},
          {:python, "a\0b", "a path or the name of a program"},
          {:load, "my_losses", "a list of strings"},
          {:load, [:my_losses], "a list of strings"},
          {:name, "MyLoss", "an atom, {:global, term} or {:via, module, term}"},
          {:name, nil, "an atom, {:global, term} or {:via, module, term}"},
          # What no process can be given is refused before there is a supervisor to take down.
          {:python_path, [<<255>>], "a list of strings"},
          {:start_timeout, 5_000_000_000, "an integer from 1 to 2147483647"},
          {:cd, "/no/such/directory", "a directory that exists"},
          {:await_ready, :yes, "true or false"},
          {:backoff, {10, 5}, "{first, longest} in milliseconds"},
          {:log_level, :loud, "one of :debug, :info, :warning, :error, :critical"}
        ] do
      test "refuses #{inspect(value)} for :#{option}" do
        sentence =
          message(fn ->
            CustomLoss.start_link([{unquote(option), unquote(Macro.escape(value))}])
          end)

        assert sentence =~
                 "invalid value for :#{unquote(option)} of Tinkex.CustomLoss: expected #{unquote(expected)}"

        assert sentence =~ ", got: #{inspect(unquote(Macro.escape(value)))}"
      end
    end

    for {env, names} <- [
          {[{"A=B", "secret"}], ~s(["A=B"])},
          {%{A: "secret"}, "[:A]"},
          {%{"A" => <<"secret", 255>>}, ~s(["A"])}
        ] do
      test "refuses #{inspect(env)} for :env, and shows names alone" do
        sentence = message(fn -> CustomLoss.start_link(env: unquote(Macro.escape(env))) end)

        assert sentence =~
                 "invalid value for :env of Tinkex.CustomLoss: expected a map or list of"

        assert String.ends_with?(sentence, "got: #{unquote(names)}")
        refute sentence =~ "secret"
      end
    end

    test "names the options that there are" do
      sentence = message(fn -> CustomLoss.start_link(worker: 2) end)

      assert sentence =~
               "Tinkex.CustomLoss has no option :worker; its options are [:name, :python,"
    end

    test "documents every option" do
      for option <- Map.keys(Options.start!([])),
          do: assert(Options.start_docs() =~ "  * `:#{option}` - ")
    end

    test "is told apart from others by its name under a supervisor" do
      assert %{id: {CustomLoss, One}, type: :supervisor} = CustomLoss.child_spec(name: One)
    end
  end

  # None of these need a pool: they are refused before one is looked for.
  describe "a call" do
    defp compute(opts), do: CustomLoss.compute(NoSuchPool, nil, [[-1.0]], opts)

    test "needs something to compute" do
      assert message(fn -> compute([]) end) =~ "there is nothing to compute: give :base_loss"
    end

    test "refuses what is no timeout" do
      assert message(fn -> compute(base_loss: :nll, timeout: 0) end) =~
               "expected a positive number of milliseconds or :infinity, got: 0"

      # No receive waits longer; the request would have been with its worker when that shows.
      assert message(fn -> compute(base_loss: :nll, timeout: :timer.hours(24 * 365)) end) =~
               "expected at most 4294967295 milliseconds, or :infinity, got: 31536000000"

      for timeout <- [:soon, 0, 5_000_000_000] do
        assert message(fn -> CustomLoss.terms(NoSuchPool, timeout) end) =~
                 "invalid value for the timeout of Tinkex.CustomLoss.terms/2: expected"
      end
    end

    test "refuses what names no pool" do
      for server <- ["MyLoss", 1, {:a, :b, :c}, {MyLoss, "node"}, nil],
          call <- [&CustomLoss.info/1, &CustomLoss.terms/1] do
        assert message(fn -> call.(server) end) =~
                 "expected the name of a pool, its pid or {name, node}, got: #{inspect(server)}"
      end
    end

    test "refuses a base loss that cannot be named" do
      for fun <- [5, fn -> 1 end, true],
          do: assert(message(fn -> compute(base_loss: fun) end) =~ "base")

      assert message(fn -> compute(base_loss: {:nll, 5}) end) =~
               "invalid value for :params of the base loss: expected a map or keyword list, got: 5"

      assert message(fn -> compute(base_loss: %{fn: :nll, weight: 1}) end) =~
               "the base loss has no option :weight"
    end

    test "takes a base loss in each of its forms" do
      for base <- [:nll, "nll", {:nll, %{a: 1}}, {:nll, a: 1}, %{fn: :nll, params: %{a: 1}}],
          do: assert(%{base_loss: %{fn: "nll"}} = Options.call!(base_loss: base))
    end

    test "refuses two regularizers of one name" do
      kl = %{name: "kl", fn: :kl, weight: 1}

      assert message(fn -> compute(regularizers: [kl, kl]) end) =~
               ~s(two regularizers are named "kl")
    end

    test "refuses regularizers that are no list" do
      assert message(fn -> compute(regularizers: %{name: "a"}) end) =~
               "expected :regularizers to be a list"

      assert message(fn -> compute(regularizers: [name: "kl", fn: :kl, weight: 1]) end) =~
               "expected :regularizers to be a list of regularizers, got one"
    end

    test "needs a pool that runs" do
      assert {:error, %CustomLoss.WorkerError{reason: :not_running}} = compute(base_loss: :nll)
    end
  end
end
